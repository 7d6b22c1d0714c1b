"""What is asked of plain texts: completions, and the tokens that a text or a conversation is.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `text/`, `answer/`, `observe/`, `http/` and
`chat/`. Does not know how an answer is generated. Read `routes.py` first.
"""
