"""An engine's manifest, or a plan, as one page of HTML that needs nothing but itself; and the parts
that other pages are made of: plots as SVG, their axes, looks, words.

Imports `plan/` and `quantize/`. Does not know how an engine is built, and judges nothing.
Read `page.py` first, then `drawing.py`.
"""
