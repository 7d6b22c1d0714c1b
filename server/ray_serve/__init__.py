"""An engine -> replicas of its host that Ray Serve places, watches, scales and exchanges.

Imports `replicas/`. Does not know HTTP or a request: traffic goes from gunicorn's workers to the
hosts, past Ray; no worker imports it. Read `replica.py` first.
"""
