"""Bytes -> a valid body or a refusal, and the form of all that is sent: as the API page has it.

Imports the ground floor only. Does not know what a field means to a model, nor Flask's request.
Read `shapes.py` first, then `refusal.py`.
"""
