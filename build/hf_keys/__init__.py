"""A Hugging Face config.json -> TensorRT-LLM's words, family by family; and which backends run it.

Imports `families/`. Does not know a tensor. Read `hf_config.py` first.
"""
