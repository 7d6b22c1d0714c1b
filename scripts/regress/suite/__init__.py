"""A suite's YAML -> what is asked: texts to score, prompts to answer, tasks to solve, long texts.

Imports no wing of this floor. Does not know a server, an answer, or what is right.
Read `suite.py` first, then `reading.py`.
"""
