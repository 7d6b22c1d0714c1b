"""Names and shapes of Hugging Face tensors -> TensorRT-LLM's: tables, family by family.

Imports `forms/` and the contract of a source. Does not read weights or know who holds them.
Read `architectures.py` first.
"""
