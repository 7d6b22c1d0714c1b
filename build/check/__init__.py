"""A quantised Hugging Face checkpoint -> what keeps runtimes from loading it, or from being right.

Imports `forms/`, `hf_keys/` and `sources/`. Does not know how a checkpoint is made, and runs none:
each rule is a trap that users of one have met. Read `rules.py` first.
"""
