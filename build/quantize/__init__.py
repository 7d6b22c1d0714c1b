"""A source's tensors -> an engine's, rounded: unit by unit, or layer by layer on calibration text.

Imports `forms/`, `families/` and the contract of a source. Does not know files, ranks or settings.
Read `units.py` first, then `layerwise.py`.
"""
