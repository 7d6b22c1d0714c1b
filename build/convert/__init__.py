"""A plan and a source -> a checkpoint's files, a few tensors at a time: resumable, whole or absent.

Imports `plan/`, `quantize/`, `sources/` (names of files), `families/` and `forms/`. Does not know
who runs what it writes.
Read `stage.py` first, then `conversion.py`; what decides that a build is resumed is `journal.py`.
"""
