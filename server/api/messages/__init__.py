"""Anthropic's Messages: content blocks in, blocks and events out.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `text/`, `answer/`, `http/` and `chat/`.
Does not know how an answer is generated. Read `routes.py` first, then `request.py` and `answer.py`.
"""
