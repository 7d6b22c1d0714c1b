"""Chunks of sequences -> logits, with TensorRT plans of our own network on one or several GPUs.

Imports the ground words, `machine/`, `checkpoint/` and `batching/`. Does not know how plans are
made, but what is bound to them; TensorRT is imported late.
Read `executor.py` first, then `rank.py`.
"""
