"""Two recordings -> findings: numerics, quality and speed against limits, a sentence for each.

Imports `numerics/`, `speed/`, `subject/` and `suite/`. Does not know a server: all is asked.
Read `comparison.py` first.
"""
