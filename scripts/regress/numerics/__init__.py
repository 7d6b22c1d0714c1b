"""Two engines' log probabilities -> how far one is from the other, and which loss is real.

Imports no wing of this floor but what a recording holds. Does not know a server or a limit.
Read `divergence.py` first.
"""
