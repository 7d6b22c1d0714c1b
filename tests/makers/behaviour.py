"""An Api of a server at an address, and what is known of an engine of ours."""

from __future__ import annotations

import json
from pathlib import Path

from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.subject.api import Api
from enginehouse.server.client.connection import Connection, parse_address

MAX_BYTES = 16 << 20


def api_at(url: str) -> Api:
    return Api(Connection(parse_address(url), lambda: 60.0, max_bytes=MAX_BYTES))


def known_of(engine: Path) -> Known:
    """As its directory says, with the server's own prices."""
    ends = json.loads((engine / "generation_config.json").read_text())["eos_token_id"]
    return Known(eos_token_ids=tuple(ends), is_ours=True, prices=(0.35, 0.40))
