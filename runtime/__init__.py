"""The ground floor: an engine directory becomes tokens. Knows neither text nor HTTP."""

import os

# Threads of libgomp that wait for each other spin; beside one busy process on the same cores its
# default of some 300,000 turns made a token take a hundred times as long. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Large tensors in huge pages: a fresh one costs a page fault for each 4 KiB otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
