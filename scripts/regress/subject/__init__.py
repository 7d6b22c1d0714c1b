"""An engine directory or a URL -> somebody to ask: its server, its API, its memory, its machine.

Imports no wing of this floor. Does not know what is asked, nor what an answer should be.
Read `subject.py` first, then `api.py`.
"""
