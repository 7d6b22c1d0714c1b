"""What a request took, and why it ended, for those who look on: headers, log, metrics and traces.

Imports `wire/` and `answer/`. Does not know an endpoint, nor who collects what is told.
Read `timing.py` first, then `tracing.py`.
"""
