"""What `scripts/bench_serving.py` is made of: our engines and their peers, in turns; and
`scripts/bench_server.py`: our HTTP layer and its peer.

Each contender is a process (or a server, and a process that loads it) that is asked by lines of
JSON: `child.py` is the asked side, `contender.py` the asking one, and the files `run_*.py` are what
runs in each, some of them in a peer's own environment. `quiet.py` tells what others take of the
machine meanwhile, `machine.py` and `limits.cpp` what the machine could do, `goals.py` what is to be
reached. Read `contender.py` first.
"""
