"""A server -> what it does: every field asked once, and the shape of it.

To be written.
"""
