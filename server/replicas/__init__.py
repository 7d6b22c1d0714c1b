"""A request -> the replica of the engine that answers it, of those that are ready.

Imports nothing of its floor. Does not know HTTP or text: token ids, names and loads come in.
Read `prefix_router.py` first.
"""
