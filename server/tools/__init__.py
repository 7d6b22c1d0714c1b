"""Calls of tools in a model's text: how each format looks, is read, and is enforced by a grammar.

Imports `text/`. Does not know HTTP or the engine; a format is one file and its name
in `tool_choice.py`. Read `format.py` first.
"""
