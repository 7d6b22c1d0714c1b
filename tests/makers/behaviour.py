"""An Api of a server at an address, and what is known of an engine of ours."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.subject.api import Api, Reply
from enginehouse.server.client.connection import Connection, parse_address


class Recorded(Api):
    """Notes every body that was granted, with its path; ended: the cases that did."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.ended: list[str] = []

    def reply(self, path: str, **fields: Any) -> Reply:
        found = super().reply(path, **fields)
        if found.status == 200:
            self.asked.append((path, {"model": self.model, **fields}))
        return found

    def lines(self, path: str, **fields: Any) -> Generator[str, None, None]:
        self.asked.append((path, {"stream": True, **fields}))
        return super().lines(path, **fields)


def connection_to(url: str) -> Connection:
    return Connection(parse_address(url), lambda: 60.0)


def api_at(url: str) -> Api:
    return Api(connection_to(url))


def known_of(engine: Path) -> Known:
    """As its directory says, with the server's own prices."""
    ends = json.loads((engine / "generation_config.json").read_text())["eos_token_id"]
    return Known(eos_token_ids=tuple(ends), is_ours=True, prices=(0.35, 0.40))
