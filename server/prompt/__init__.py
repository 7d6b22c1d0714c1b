"""Messages or texts -> prompt ids, by the engine's own chat template and tokenizer.

Imports `text/`, `tools/`, `formats/` and `wire/` (refusals). Does not know HTTP, or how an answer
is read. Read `chat.py` first.
"""
