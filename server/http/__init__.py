"""An HTTP request -> its answer, whole or as a stream: the way every endpoint takes.

Imports `wire/`, `request/`, `prompt/`, `tools/`, `answer/` and `observe/`. Does not know what the
fields mean, nor gunicorn's processes. Read `completion_routes.py` first, then `service.py`.
"""
