"""A checkpoint's config -> TensorRT plans of our own network, compiled with or without a GPU.

Imports `plan/`, `families/` and `forms/`. Does not know how plans are run: that is
runtime/tensorrt's. Read `network.py` first, then `plans.py`.
"""
