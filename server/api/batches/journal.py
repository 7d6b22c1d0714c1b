"""Batches as they are kept: which there are, who works on each, and every line's answer.

A line's answer is committed once, whoever has it and however often it was made: so nothing is lost
when a process is killed, and no line is answered twice. Knows no HTTP and no request's meaning.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container, Iterator
from typing import NamedTuple

from msgspec.json import decode, encode

from enginehouse.server.api.batches.folder import Folder
from enginehouse.server.http.processes import own_mark, runs
from enginehouse.server.http.shared_file import transaction
from enginehouse.server.wire.ids import Json


class Batch(NamedTuple):
    """data: the batch object as it is told. cancel_asked_at: in seconds since 1970; 0: never."""

    owner: str
    data: Json
    cancel_asked_at: int

    @property
    def id(self) -> str:
        return str(self.data["id"])


class Journal:
    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._db = folder.db

    def add(self, owner: str, data: Json) -> None:
        query = "insert into batches (id, owner, created, data, is_open) values (?, ?, ?, ?, 1)"
        self._db.execute(query, (data["id"], owner, data["created_at"], encode(data)))

    def get(self, owner: str, batch_id: str) -> Batch | None:
        query = "select owner, data, wants_cancel from batches where id = ? and owner = ?"
        row = self._db.execute(query, (batch_id, owner)).fetchone()
        return None if row is None else Batch(row[0], decode(row[1]), row[2])

    def all(self, owner: str) -> list[Json]:
        """The oldest first."""
        query = "select data from batches where owner = ? order by created, rowid"
        return [decode(data) for (data,) in self._db.execute(query, (owner,))]

    def reads(self, file_id: str) -> str | None:
        """The batch that is open and has the file as its input."""
        for (data,) in self._db.execute("select data from batches where is_open = 1"):
            batch: Json = decode(data)
            if batch["input_file_id"] == file_id:
                return str(batch["id"])
        return None

    def claim(self, at_work: Container[str], over_at: int | None = None) -> Batch | None:
        """The oldest open batch that nobody works on: this process does from now on. at_work: the
        ids of those that it works on already. over_at: only one that is to end, as that was asked
        or its time is over by then.
        """
        query = "select id, owner, data, worker, wants_cancel from batches where is_open = 1"
        mine = own_mark()
        with transaction(self._db):
            found = self._db.execute(f"{query} order by created").fetchall()
            for batch_id, owner, data, worker, wants in found:
                taken = batch_id in at_work if worker == mine else worker and runs(worker)
                batch = Batch(owner, decode(data), wants)
                ends = over_at is None or wants or batch.data["expires_at"] <= over_at
                if ends and not taken:
                    query = "update batches set worker = ? where id = ?"
                    self._db.execute(query, (mine, batch_id))
                    return batch
        return None

    def leave(self, batch: Batch) -> None:
        """Somebody else may go on with it."""
        self._db.execute("update batches set worker = null where id = ?", (batch.id,))

    def update(self, batch: Batch) -> None:
        self._db.execute("update batches set data = ? where id = ?", (encode(batch.data), batch.id))

    def end(self, batch: Batch) -> None:
        """What it came to stands in its data and in files now."""
        query = "update batches set data = ?, is_open = 0 where id = ?"
        with transaction(self._db):
            self._db.execute("delete from answers where batch = ?", (batch.id,))
            self._db.execute(query, (encode(batch.data), batch.id))

    def ask_to_cancel(self, batch: Batch, now: int) -> None:
        query = "update batches set wants_cancel = ? where id = ? and wants_cancel = 0"
        self._db.execute(query, (now, batch.id))

    def cancel_asked_at(self, batch: Batch) -> int:
        """Seconds since 1970; 0 where nobody has asked."""
        query = "select wants_cancel from batches where id = ?"
        [found] = self._db.execute(query, (batch.id,)).fetchone()
        return int(found)

    def answered(self, batch: Batch) -> set[int]:
        """The numbers of the lines that have an answer or an error."""
        query = "select line from answers where batch = ?"
        return {line for (line,) in self._db.execute(query, (batch.id,))}

    def counts(self, batch: Batch) -> tuple[int, int]:
        """How many lines have an answer, and how many an error."""
        query = "select is_error, count(*) from answers where batch = ? group by is_error"
        found = dict(self._db.execute(query, (batch.id,)).fetchall())
        return found.get(0, 0), found.get(1, 0)

    def put_answer(self, batch: Batch, line: int, answer: Json, is_error: bool) -> bool:
        """False where the line has one already."""
        try:
            query = "insert into answers values (?, ?, ?, ?)"
            self._db.execute(query, (batch.id, line, int(is_error), encode(answer)))
        except sqlite3.IntegrityError:
            return False
        return True

    def answers(self, batch: Batch, are_errors: bool) -> Iterator[bytes]:
        """JSON of each, by line."""
        query = "select data from answers where batch = ? and is_error = ? order by line"
        for (data,) in self._db.execute(query, (batch.id, int(are_errors))):
            yield data
