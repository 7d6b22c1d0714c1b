"""A scripted server for as long as it is wanted, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MODEL = "scripted"
_SERVE = Path(__file__).with_name("serve.py")
_END_S = 30


@contextmanager
def scripted_server(turns: Sequence[str] | None = None) -> Iterator[str]:
    """Its address. turns: what is said one after the other; None: the answers to clients.

    RuntimeError where it does not start; what it says of that is on standard error.
    """
    command = [sys.executable, str(_SERVE), *(("--turns", json.dumps(turns)) if turns else ())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"the scripted server ended with {process.wait(_END_S)}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(_END_S)
