"""Token outputs -> OpenAI's objects, whole and in chunks, with usage and cost.

Imports `text/`, `tools/` and `prompt/`. Does not know HTTP: what it yields is sent by `http/`.
Read `completion.py` first, then `choice.py`.
"""
