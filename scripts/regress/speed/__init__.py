"""Two servers -> turns -> better, same, worse or cannot tell, for each metric.

Imports `subject/` and `suite/`. Does not know what an engine is, nor what it answers.
Read `metrics.py` first, then `turns.py`.
"""
