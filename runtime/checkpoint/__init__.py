"""A TensorRT-LLM checkpoint -> the numbers of a model: cut, packed and merged; rope and traits.

Imports the ground words only. Does not know who multiplies with the weights, nor how they came to
be rounded: build/ and every backend read the same file. Read `sharding.py` first.
"""
