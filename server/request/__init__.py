"""A valid body -> what is asked of the engine: fields that agree with each other, one constraint.

Imports `wire/`, `prompt/`, `tools/` and `text/`. Does not know Flask, tokens or the engine's state.
Read `asked.py` first, then `chat_request.py`.
"""
