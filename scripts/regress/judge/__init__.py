"""Two recordings -> findings: numerics, quality and speed against limits, a sentence for each.

Imports `numerics/`, `speed/`, `subject/`. Does not know a server: all was asked before.
Read `comparison.py` first.
"""
