"""A server of one's own; that it ends with a killed parent is tested through the chat."""

from __future__ import annotations

import select
import sys
from pathlib import Path

import pytest

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.own_server import OwnServer, free_port


def test_a_server_of_ones_own_that_is_not_ready_in_time_is_told_to_end(tmp_path: Path) -> None:
    """With a program that is never ready, and says when it is told to end."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('told to end')))\n"
        "print('up', flush=True)\n"
        "signal.pause()"
    )
    log = tmp_path / "log"
    with OwnServer([sys.executable, "-c", code], free_port(), log) as server:
        while "up" not in log.read_text():
            select.select([], [], [], 0.02)
        with pytest.raises(EnginehouseError, match="was not ready in 0 s; it said last: up "):
            server.wait_ready(0)
    assert log.read_text() == "up\ntold to end\n"
