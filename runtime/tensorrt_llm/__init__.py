"""Requests -> TensorRT-LLM's own in-flight batching, and its answers -> our words.

Imports the ground words, `machine/` and `grammar/`. Does not know our scheduler or our model:
TensorRT-LLM has its own, and is imported when an engine is opened. Read `executor.py` first.
"""
