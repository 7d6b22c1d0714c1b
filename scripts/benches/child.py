"""The asked side: a process that opens something, says `ready`, and answers lines of JSON.

Runs in a peer's environment too: the standard library alone. Whatever a library prints goes to
standard error, which is the log.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Operation = Callable[..., dict[str, Any]]


def answer(open_all: Callable[[], dict[str, Operation]]) -> None:
    """Until standard input ends. open_all: what takes time before the first request is possible."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    operations = open_all()
    print(json.dumps({"ready": sorted(operations)}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = operations[asked.pop("op")](**asked)
        except Exception as error:  # said, and the next is answered
            told = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(told), file=out, flush=True)
