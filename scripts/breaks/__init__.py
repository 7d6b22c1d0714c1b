"""What `scripts/faults.py` is made of: a real server, its clients, and the ways to break it.

`server.py` starts `enginehouse serve` and looks at it from outside; `clients.py` asks it, and
keeps what came; `case.py` is what a fault is given and what it says at its end. Each file `of_*.py`
breaks one part: clients, the host, workers, files. `inject/` is put on the server's path: Python
reads it in every process, and it does what no signal does. `soak.py` breaks nothing and looks for
what grows. Read `case.py` first.
"""
