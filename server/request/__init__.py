"""What is asked of the engine, whichever body it came in: fields that agree, one constraint.

Imports `wire/`, `prompt/`, `tools/` and `text/`. Does not know Flask, tokens or the engine's state.
Read `asked.py` first, then `chat_request.py`.
"""
