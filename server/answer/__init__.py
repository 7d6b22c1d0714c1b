"""Token outputs -> the choices of an answer while it grows, with counts, cost and moments.

Imports `text/`, `tools/`, `formats/` and `prompt/`. Does not know HTTP, nor the form of
an answer, which is a folder's of `api/`.
Read `completion.py` first, then `choice.py`.
"""
