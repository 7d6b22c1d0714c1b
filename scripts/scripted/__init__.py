"""A server whose engine is scripted: the whole application, on a free port of the loopback
interface, with a tiny tokenizer of its own. Other people's clients, judges and agents are tried
against it, as it is the server that is tried and not a model.

`answers.py` is what is said; `engine.py` says it, and holds it to the grammar that a request asks
for; `serve.py` is the process, and `process.py` starts one from another script, which needs nothing
installed for that. Read `answers.py` first.
"""
