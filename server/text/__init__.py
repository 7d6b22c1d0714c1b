"""Token ids -> text and its parts: pieces, held-back stop strings, reasoning, log probabilities.

Imports the ground floor only. Does not know HTTP, tools or the form of an answer.
Read `detokenizer.py` first.
"""
