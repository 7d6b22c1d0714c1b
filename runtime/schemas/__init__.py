"""A JSON schema of any draft, as generators write it -> the same in words that `grammar/` enforces.

Imports `grammar/`'s words for refusals and patterns. Does not know xgrammar, tokens or requests.
Read `plain.py` first: it walks the schema; `merged.py` makes one node of several.
"""
