"""Responses and conversations that are kept: one SQLite file, which all workers of a server share.

Each belongs to the API key that it was asked with, and nobody else finds it. Those longest unused
go when there are too many bytes of them, and each after its time. Knows no HTTP, and not what an
item is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from enginehouse.server.http.shared_file import KEPT, opened, transaction
from enginehouse.server.wire.ids import Json

_WAIT_S = 2.0
_TABLES = """
create table if not exists kept (
    id text primary key, owner text not null, created real not null, size integer not null,
    data blob not null, items blob not null, worker text, wants_cancel integer not null default 0
);
create index if not exists kept_by_age on kept (created);
create table if not exists places (item text, kept text, primary key (item, kept)) without rowid;
create index if not exists places_by_kept on places (kept);
create table if not exists total (bytes integer not null);
insert into total select 0 where not exists (select 1 from total);
create trigger if not exists kept_is_new after insert on kept begin
    update total set bytes = bytes + new.size;
end;
create trigger if not exists kept_changes after update of size on kept begin
    update total set bytes = bytes + new.size - old.size;
end;
create trigger if not exists kept_is_gone after delete on kept begin
    update total set bytes = bytes - old.size;
    delete from places where kept = old.id;
end;
"""


class Kept(NamedTuple):
    """data: the response, or the conversation. items: of a response its own input, of a
    conversation all. worker: the mark of the process that still works on it.
    """

    data: Json
    items: list[Json]
    worker: str | None


class Store:
    """path: of the file; `:memory:` is this process's own. max_bytes, ttl_s: of what is kept."""

    def __init__(self, path: Path | str, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._db = opened(path, _TABLES, KEPT, _WAIT_S)

    def put(
        self, owner: str, data: Json, items: Sequence[Json], now: float, worker: str | None = None
    ) -> None:
        """Keep it, in the place of one that has its `id`. now: seconds since 1970."""
        with transaction(self._db):
            self._put(owner, data, items, now, worker)

    def _put(
        self, owner: str, data: Json, items: Sequence[Json], now: float, worker: str | None = None
    ) -> None:
        blobs = msgspec.json.encode(data), msgspec.json.encode(items)
        size = sum(map(len, blobs))
        self._db.execute(
            "insert into kept (id, owner, created, size, data, items, worker) "
            "values (?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set "
            "created = excluded.created, size = excluded.size, data = excluded.data, "
            "items = excluded.items, worker = excluded.worker where owner = excluded.owner",
            (data["id"], owner, now, size, *blobs, worker),
        )
        self._db.executemany(
            "insert or ignore into places values (?, ?)",
            [(item["id"], data["id"]) for item in (*items, *data.get("output", ()))],
        )
        self._forget_old(now)

    def find_item(self, owner: str, item_id: str, now: float) -> Json | None:
        """Whatever response or conversation it is of."""
        row = self._db.execute(
            "select id from kept join places on kept = id where item = ? and owner = ? "
            "order by created desc limit 1",
            (item_id, owner),
        ).fetchone()
        kept = None if row is None else self.get(owner, row[0], now)
        if kept is None:
            return None
        items = (*kept.items, *kept.data.get("output", ()))
        return next((item for item in items if item["id"] == item_id), None)

    def append(self, owner: str, kept_id: str, items: Sequence[Json], now: float) -> bool:
        """To a conversation; whether it is there."""
        with transaction(self._db):
            kept = self.get(owner, kept_id, now)
            if kept is not None:
                self._put(owner, kept.data, [*kept.items, *items], now)
        return kept is not None

    def get(self, owner: str, kept_id: str, now: float) -> Kept | None:
        row = self._db.execute(
            "select data, items, worker from kept where id = ? and owner = ? and created > ?",
            (kept_id, owner, now - self._ttl_s),
        ).fetchone()
        if row is None:
            return None
        data: Any = msgspec.json.decode(row[0])
        items: Any = msgspec.json.decode(row[1])
        return Kept(data, items, row[2])

    def renew(self, owner: str, kept_ids: Sequence[str], now: float) -> None:
        """They were used: their time begins again."""
        query = "update kept set created = ? where id = ? and owner = ?"
        with transaction(self._db):
            self._db.executemany(query, [(now, kept_id, owner) for kept_id in kept_ids])

    def drop(self, owner: str, kept_id: str) -> bool:
        """Whether it was there."""
        query = "delete from kept where id = ? and owner = ?"
        return self._db.execute(query, (kept_id, owner)).rowcount > 0

    def ask_to_cancel(self, owner: str, kept_id: str) -> None:
        query = "update kept set wants_cancel = 1 where id = ? and owner = ?"
        self._db.execute(query, (kept_id, owner))

    def wants_cancel(self, owner: str, kept_id: str) -> bool:
        """Also of what is not there any more."""
        query = "select wants_cancel from kept where id = ? and owner = ?"
        row = self._db.execute(query, (kept_id, owner)).fetchone()
        return row is None or bool(row[0])

    def _forget_old(self, now: float) -> None:
        self._db.execute("delete from kept where created <= ?", (now - self._ttl_s,))
        query = "delete from kept where rowid = (select rowid from kept order by created, rowid)"
        while self._num_bytes() > self._max_bytes:
            self._db.execute(query)

    def _num_bytes(self) -> int:
        [found] = self._db.execute("select bytes from total").fetchone()
        return int(found)
