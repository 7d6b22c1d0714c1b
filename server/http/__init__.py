"""What is asked -> its answer, whole or as a stream: the way every endpoint takes.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `answer/` and `observe/`. Does not know what the
fields mean, nor an endpoint's form. Read `conversations.py` first, then `service.py`.
"""
