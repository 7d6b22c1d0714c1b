"""An engine directory -> running processes: gunicorn, its workers, the engine host, every rank.

Imports the application, `batches/`, `nodes/`, `replicas/` and `wire/`. Does not know a request.
Read `gunicorn_hooks.py` first.
"""
