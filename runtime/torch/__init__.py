"""Chunks of sequences -> logits, with torch on a CPU or one CUDA device: the embedded backend.

Imports the ground words, `machine/`, `checkpoint/` and `batching/`. Does not know requests'
grammars, sockets or the other backends. Read `executor.py` first, then `decoder.py`.
"""
