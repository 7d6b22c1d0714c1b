"""The file that names the replicas which answer now: written whole by one, read by every worker.

    {"replicas": [{"name": "a", "address": "tcp://10.0.0.1:5555", "digest": "sha256:..."}]}

A replica that is to be asked no more is taken out; what it runs goes on. Knows no socket.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from enginehouse.runtime.errors import EnginehouseError


class Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """name: any, its own. address: ZeroMQ's. digest: of its engine; None: any worker may ask it."""

    name: str
    address: str
    digest: str | None = None


class _File(msgspec.Struct, frozen=True):
    replicas: list[Replica]


def write_replicas(path: Path, replicas: Iterable[Replica]) -> None:
    """Readers find the old file or the new one. One process alone writes it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(msgspec.json.encode(_File(sorted(replicas, key=_name))))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_replicas(path: Path) -> tuple[Replica, ...]:
    """Raises EnginehouseError for a file that is not there, or no such one."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File).replicas
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EnginehouseError(
            f"the replicas file {path} cannot be read ({error}); wanted "
            '{"replicas": [{"name": ..., "address": ..., "digest": ...}]}'
        ) from None
    if len({each.name for each in found}) < len(found):
        raise EnginehouseError(f"the replicas file {path} has a name twice; give each its own")
    return tuple(found)


def stamp(path: Path) -> tuple[int, int] | None:
    """Another one when the file was written anew; None: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _name(replica: Replica) -> str:
    return replica.name
