"""OpenAI's chat completions: a body -> what is asked of the model, an answer -> objects and chunks.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `text/`, `answer/` and `http/`. Does not know how
a prompt is made or an answer generated. Read `routes.py` first.
"""
