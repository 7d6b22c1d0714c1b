"""Chunks of sequences -> logits, with our own C++ kernels on a CPU: the compiled backend.

Imports the ground words, `machine/`, `checkpoint/` and `batching/`. Does not know requests'
grammars, sockets or the other backends; native/ holds the C++ and knows no Python. Read
`executor.py` first, then `packed_model.py` and native/model.h.
"""
