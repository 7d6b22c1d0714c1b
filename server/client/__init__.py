"""An address -> answers: what talks to a server from outside, over HTTP, as any client does.

Imports the error tree of the ground floor and the standard library; no other wing, which is how it
can show what a client sees. Does not know an engine, a tokenizer or a terminal.
Read `connection.py` first.
"""
