"""The web page of a server, at `GET /`: static files, and what its forms are made of.

Imports `wire/`. Does not know a request of the API: the page is a client of it like any other.
Read `routes.py` first, then `static/main.js`.
"""
