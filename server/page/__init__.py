"""The web page of a server, at `GET /`: static files, what its forms are made of, and the engine
as it runs.

Imports `wire/` and `http/`. Does not know a request of the API: the page is a client of it like any
other.
Read `routes.py` first, then `static/main.js`.
"""
