"""Files and batches: many requests in one file, answered when nothing else asks.

Imports `wire/`, `request/`, `http/`, `responses/`. Does not know what a request of a batch means:
each is sent through the application, as a client's would be. Read `routes.py` first, then
`runner.py`.
"""
