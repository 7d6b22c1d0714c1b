"""An executor -> a service: one engine host process, and gunicorn's workers as its clients.

Imports the ground words and `machine/`; `process.py` alone opens engines. Does not know HTTP, text
or any backend; a client imports no tensor library. Read `messages.py` first.
"""
