"""A server -> what it does: every field asked once, streams beside plain answers, and the shape of all of it.

To be written.
"""
