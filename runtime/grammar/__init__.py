"""A request's constraint -> which tokens may follow: schemas and patterns, in xgrammar's words.

Imports the ground words only. Does not know the scheduler, the model or any text:
a token is its bytes here. Read `constraint.py` first, then `compiler.py`.
"""
