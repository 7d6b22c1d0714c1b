"""Responses and conversations that are kept: one SQLite file, which all workers of a server share.

Each belongs to the API key that it was asked with, and nobody else finds it. The oldest go when
there are too many bytes of them, and each after its time. Knows no HTTP, and not what an item is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from enginehouse.server.api.responses.resource import Json

_WAIT_S = 2.0  # for another worker
_TABLES = """
create table if not exists kept (
    id text primary key, owner text not null, created real not null, size integer not null,
    data blob not null, items blob not null, worker text, wants_cancel integer not null default 0
);
create index if not exists kept_by_age on kept (created);
create table if not exists places (item text primary key, kept text not null);
create index if not exists places_by_kept on places (kept);
create trigger if not exists forget_places after delete on kept begin
    delete from places where kept = old.id;
end;
"""


class Kept(NamedTuple):
    """data: the response, or the conversation. items: of a response its own input, of a
    conversation all. worker: the mark of the process that still works on it. wants_cancel: it
    should end.
    """

    data: Json
    items: list[Json]
    worker: str | None
    wants_cancel: bool


class Store:
    """path: of the file; `:memory:` is this process's own. max_bytes, ttl_s: of what is kept."""

    def __init__(self, path: Path | str, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._db = sqlite3.connect(
            path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
        )
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        self._db.executescript(_TABLES)

    def put(
        self, owner: str, data: Json, items: Sequence[Json], now: float, worker: str | None = None
    ) -> None:
        """Keep it, in the place of one that has its `id`. now: seconds since 1970."""
        blobs = msgspec.json.encode(data), msgspec.json.encode(items)
        size = sum(map(len, blobs))
        with self._locked():
            self._db.execute(
                "insert into kept (id, owner, created, size, data, items, worker) "
                "values (?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set "
                "size = excluded.size, data = excluded.data, items = excluded.items, "
                "worker = excluded.worker where owner = excluded.owner",
                (data["id"], owner, now, size, *blobs, worker),
            )
            self._db.executemany(
                "insert or ignore into places values (?, ?)",
                [(item["id"], data["id"]) for item in (*items, *data.get("output", ()))],
            )
            self._forget_old(now)

    def find_item(self, owner: str, item_id: str, now: float) -> Json | None:
        """Whatever response or conversation it is of."""
        row = self._db.execute("select kept from places where item = ?", (item_id,)).fetchone()
        kept = None if row is None else self.get(owner, row[0], now)
        if kept is None:
            return None
        items = (*kept.items, *kept.data.get("output", ()))
        return next((item for item in items if item["id"] == item_id), None)

    def append(self, owner: str, kept_id: str, items: Sequence[Json], now: float) -> bool:
        """To a conversation; whether it is there."""
        kept = self.get(owner, kept_id, now)
        if kept is None:
            return False
        self.put(owner, kept.data, [*kept.items, *items], now)
        return True

    def get(self, owner: str, kept_id: str, now: float) -> Kept | None:
        row = self._db.execute(
            "select data, items, worker, wants_cancel from kept "
            "where id = ? and owner = ? and created > ?",
            (kept_id, owner, now - self._ttl_s),
        ).fetchone()
        if row is None:
            return None
        data: Any = msgspec.json.decode(row[0])
        items: Any = msgspec.json.decode(row[1])
        return Kept(data, items, row[2], bool(row[3]))

    def drop(self, owner: str, kept_id: str) -> bool:
        """Whether it was there."""
        query = "delete from kept where id = ? and owner = ?"
        return self._db.execute(query, (kept_id, owner)).rowcount > 0

    def ask_to_cancel(self, owner: str, kept_id: str) -> None:
        query = "update kept set wants_cancel = 1 where id = ? and owner = ?"
        self._db.execute(query, (kept_id, owner))

    def _forget_old(self, now: float) -> None:
        self._db.execute("delete from kept where created <= ?", (now - self._ttl_s,))
        [total] = self._db.execute("select coalesce(sum(size), 0) from kept").fetchone()
        while total > self._max_bytes:
            kept_id, size = self._db.execute(
                "select id, size from kept order by created, rowid limit 1"
            ).fetchone()
            self._db.execute("delete from kept where id = ?", (kept_id,))
            total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")
