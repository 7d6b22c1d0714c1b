"""Somebody to ask: an engine directory, which is served as long as it is asked, or a URL.

Knows the engine's manifest where there is one; does not know what is asked.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from enginehouse.regress.subject.api import Api
from enginehouse.regress.subject.machine import describe_machine
from enginehouse.regress.subject.memory import memory_of
from enginehouse.runtime.engine import Manifest, read_engine
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import (
    Connection,
    ServerRefused,
    ServerUnreachable,
    is_address,
    parse_address,
)
from enginehouse.server.client.own_server import OwnServer, free_port, serve_command

_START_S = 1200.0
_SILENCE_S = 600.0
_MAX_BYTES = 64 << 20  # the log probabilities of a long prompt
_OURS = "enginehouse"
_OF_KEYS = ("ENGINEHOUSE_API_KEYS", "ENGINEHOUSE_KEY_")


@dataclass
class Subject:
    """target: as it was named. server, start_s: of an engine directory. limits: what the server
    says of its model, such as max_model_len.
    """

    target: str
    api: Api
    is_ours: bool
    manifest: Manifest | None = None
    server: OwnServer | None = None
    start_s: float | None = None
    limits: dict[str, object] = field(default_factory=dict)

    @property
    def max_seq_len(self) -> int | None:
        """Tokens of prompt and answer, where the server or the manifest says it."""
        found = self.limits.get("max_model_len")
        return found if isinstance(found, int) else None

    @property
    def kind(self) -> str:
        """What the server calls itself, such as vllm; "" of one that does not say."""
        return str(self.limits.get("owned_by", ""))

    @property
    def machine(self) -> dict[str, str]:
        """Of an engine that is served here; a URL's is not known."""
        return describe_machine() if self.server is not None else {}

    def memory(self) -> int | None:
        """Bytes of the server's processes; None of a URL's."""
        return memory_of(self.server.pid) if self.server is not None else None


@contextmanager
def open_subject(
    target: str, log: Path, *, model: str | None = None, api_key: str | None = None
) -> Generator[Subject, None, None]:
    """Start what is to be started, and say who answers. Raises EnginehouseError.

    log: the server's, kept when it fails. model, api_key: of a URL.
    """
    if is_address(target):
        yield _asked(target, target, model, api_key)
        return
    if not Path(target).is_dir():
        raise EnginehouseError(
            f"{target} is neither an engine directory nor an address like http://127.0.0.1:8000"
        )
    manifest = read_engine(Path(target)).manifest
    port = free_port()
    began = time.monotonic()
    key = secrets.token_urlsafe()
    with OwnServer(serve_command(target, port), port, log, _keyed(key)) as server:
        server.wait_ready(_START_S)
        start_s = time.monotonic() - began
        try:
            subject = _asked(target, f"http://127.0.0.1:{port}", None, key)
            subject.manifest, subject.server, subject.start_s = manifest, server, start_s
            yield subject
        except ServerUnreachable as error:
            if str(port) not in str(error):  # another server's
                raise
            raise EnginehouseError(server.explain(error)) from None


def time_start(target: str, log: Path) -> float:
    """Seconds from the start of a server's process until it takes requests; then it ends."""
    port = free_port()
    began = time.monotonic()
    with OwnServer(serve_command(target, port), port, log) as server:
        server.wait_ready(_START_S)
        return time.monotonic() - began


def _keyed(key: str) -> dict[str, str]:
    """This environment, which a server of our own reads, with a key that nobody else has and that
    may ask as much as it likes.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_KEYS)}
    return {**env, "ENGINEHOUSE_API_KEYS": key}


def _asked(target: str, url: str, model: str | None, api_key: str | None) -> Subject:
    connection = Connection(parse_address(url), lambda: _SILENCE_S, api_key, max_bytes=_MAX_BYTES)
    api = Api(connection, model)
    described = _described(connection, api.model)
    return Subject(target, api, described.get("owned_by") == _OURS, limits=described)


def _described(connection: Connection, model: str) -> dict[str, object]:
    """What /models says of the model; {} where it says nothing of it."""
    try:
        rows = json.loads(connection.fetch("GET", "/models").content)["data"]
        return next((dict(row) for row in rows if row["id"] == model), {})
    except (ServerRefused, ValueError, KeyError, TypeError):
        return {}
