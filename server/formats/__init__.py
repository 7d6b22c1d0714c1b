"""How families of models write calls of tools: a file for each, and which one a model has.

Imports `text/` and `tools/`. Does not know HTTP, the request or the engine. Read `choose.py` first;
`hermes.py` is the shortest example.
"""
