"""Calls of tools in a model's text: what a format of them is, how they are read and enforced.

Imports `text/`. Does not know HTTP, the engine or any one format: those stand in `formats/`. Read
`format.py` first.
"""
