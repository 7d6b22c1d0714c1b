"""Counts that the workers of one server share, in a file of its private folder.

A `limits` storage, so that its strategies count over all workers; and the requests that each worker
has open, which are forgotten with it. Times are the machine's monotonic clock's, which all of its
processes share: setting the wall clock changes no window. Knows no key and no HTTP.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from limits.storage import Storage

from enginehouse.server.http.shared_file import PASSING, opened, transaction

_WAIT_S = 0.2
_TABLES = """
create table if not exists counts (key text primary key, value integer, expires real);
create table if not exists open (
    key text, worker integer, value integer, primary key (key, worker)
);
"""


class SharedCounts(Storage):
    """path: of the file; `:memory:` is this process's own. worker: the process that counts."""

    STORAGE_SCHEME = None

    def __init__(self, path: Path | str, worker: int) -> None:
        super().__init__()
        self._worker = worker
        self._owed: list[str] = []  # of requests that ended while the file was taken
        self._db = opened(path, _TABLES, PASSING, _WAIT_S)
        self._forget_the_dead()
        self._db.execute("delete from open where worker = ?", (worker,))  # an older one's number

    @property
    def base_exceptions(self) -> type[Exception]:
        return sqlite3.Error

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        now = time.monotonic()
        with transaction(self._db):
            value, expires = self._row(key, now) or (0, now + expiry)
            self._db.execute("replace into counts values (?, ?, ?)", (key, value + amount, expires))
            self._db.execute("delete from counts where expires <= ?", (now,))
        return value + amount

    def get(self, key: str) -> int:
        row = self._row(key, time.monotonic())
        return row[0] if row else 0

    def get_expiry(self, key: str) -> float:
        now = time.monotonic()
        row = self._row(key, now)
        return row[1] if row else now

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        return self._db.execute("delete from counts").rowcount

    def clear(self, key: str) -> None:
        self._db.execute("delete from counts where key = ?", (key,))

    def open(self, key: str, most: int | None) -> bool:
        """Count one more request of a key, unless `most` are open."""
        with transaction(self._db):
            while self._owed:
                self._add(self._owed.pop(), -1)
            if most is not None and self._num_open(key) >= most:
                self._forget_the_dead()
                if self._num_open(key) >= most:
                    return False
            self._add(key, 1)
        return True

    def close(self, key: str) -> None:
        try:
            self._add(key, -1)
        except sqlite3.Error:
            self._owed.append(key)

    def _num_open(self, key: str) -> int:
        [total] = self._db.execute(
            "select coalesce(sum(value), 0) from open where key = ?", (key,)
        ).fetchone()
        return int(total)

    def _forget_the_dead(self) -> None:
        """Workers that ended have nothing open."""
        workers = self._db.execute("select distinct worker from open").fetchall()
        for (worker,) in workers:
            if not _lives(worker):
                self._db.execute("delete from open where worker = ?", (worker,))

    def _add(self, key: str, amount: int) -> None:
        self._db.execute(
            "insert into open values (?, ?, ?) on conflict do update set value = value + ?",
            (key, self._worker, amount, amount),
        )

    def _row(self, key: str, now: float) -> tuple[int, float] | None:
        found: tuple[int, float] | None = self._db.execute(
            "select value, expires from counts where key = ? and expires > ?", (key, now)
        ).fetchone()
        return found


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
