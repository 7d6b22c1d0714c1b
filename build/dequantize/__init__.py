"""A quantised checkpoint -> the float32 weights it means, whatever form they are stored in.

Imports `forms/` and `sources/`. Does not know which forms an engine has, nor what is made of
the weights: what an engine holds as it is stored is read by `sources/`. Read `base.py` first.
"""
