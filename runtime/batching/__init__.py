"""Requests -> iterations -> tokens: in-flight batching over whatever runs the model.

Imports the ground words, `machine/` and `grammar/`. Does not know tensors' layout, the model or
the backend: `model_runner.py` says what it asks of one. Read `scheduler.py` first.
"""
