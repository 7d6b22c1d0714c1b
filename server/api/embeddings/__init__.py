"""Embeddings of texts: vectors of the served decoder's hidden states.

Imports `wire/`, `request/`, `prompt/`, `answer/`, `observe/`, `http/` and `texts/`.
Does not know how a vector is made: that is the engine's (runtime/batching/pooling.py).
Read `routes.py` first, then `answer.py`.
"""
