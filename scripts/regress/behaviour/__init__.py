"""A server -> what it does: every field asked once, streams beside plain answers, their shapes.

Imports `subject/` and the words of findings. Does not know an engine, a figure of speed, or what a
model ought to say: a case holds for garbage as it does for sense.
Read `converse.py` first, then `judging.py`.
"""
