"""A request -> the replica of the engine that answers it, of those that are ready.

Imports nothing of its floor. Does not know HTTP or text: token ids and samplings come in, and a
file says which replicas there are. Read `prefix_router.py` first.
"""
