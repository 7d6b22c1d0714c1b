"""The forms that weights can be written in: their tensors, their rounding, the GPUs that run them.

Imports the ground floor only. Does not know families, files or plans: a weight is a matrix here.
Read `weight_forms.py` first.
"""
