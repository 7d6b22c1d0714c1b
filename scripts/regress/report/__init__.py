"""An outcome -> what people and CI read: JSON, JUnit XML, Markdown, one page of HTML, the terminal.

Imports no wing of this floor, only its `findings.py` and `outcome.py`, and the parts of a build's
report. Does not judge, nor know a
check by name: a new check needs nothing here. Read `files.py` first, then `wording.py`.
"""
