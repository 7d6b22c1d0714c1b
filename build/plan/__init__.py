"""Settings and a source -> a plan: every choice settled and checked, its cost told beforehand.

Imports `forms/`, `families/`, `hf_keys/` and `quantize/` (what that holds in memory). Does not read
a weight or write a file. Read `settings.py` first, then `build_plan.py`.
"""
