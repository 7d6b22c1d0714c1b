"""OpenAI's Responses: items in, items and events out, and a store of what was said.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `text/`, `answer/`, `http/` and `chat/`.
Does not know how an answer is generated. Read `routes.py` first, then `request.py` and `answer.py`.
"""
