"""The folder in which files and batches lie: each file's bytes, and one SQLite file about them.

All workers of a server share it; where the operator names it, it outlives them. A file is written
under another name and renamed when it is whole. Knows no HTTP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.errors import RequestError
from enginehouse.server.http.shared_file import KEPT, opened
from enginehouse.server.wire.ids import Json, new_id

_WAIT_S = 5.0  # for another worker
_TABLES = """
create table if not exists files (
    id text primary key, owner text not null, created integer not null, bytes integer not null,
    name text not null, purpose text not null
);
create table if not exists batches (
    id text primary key, owner text not null, created integer not null, data blob not null,
    is_open integer not null, worker text, wants_cancel integer not null default 0
);
create table if not exists answers (
    batch text not null, line integer not null, is_error integer not null, data blob not null,
    primary key (batch, line)
);
create index if not exists answers_by_kind on answers (batch, is_error, line);
"""


class StoredFile(NamedTuple):
    id: str
    owner: str
    created: int  # seconds since 1970
    num_bytes: int
    name: str
    purpose: str

    def told(self) -> Json:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Folder:
    """path: is made where it is missing, for this user alone. max_bytes: of all files."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._max_bytes = max_bytes
        self.db = opened(path / "state.sqlite", _TABLES, KEPT, _WAIT_S)

    def place(self, file_id: str) -> Path:
        return self.path / file_id

    def check_room(self, num_bytes: int) -> None:
        """RequestError where so many bytes more are too many."""
        [total] = self.db.execute("select coalesce(sum(bytes), 0) from files").fetchone()
        if total + num_bytes > self._max_bytes:
            raise RequestError(
                f"file: {num_bytes} bytes do not fit: all files may have {self._max_bytes}, and "
                f"{total} are there; delete some",
                param="file",
                code="no_room_for_file",
            )

    def add(
        self, source: Path, owner: str, name: str, purpose: str, now: int, file_id: str = ""
    ) -> StoredFile:
        """Take a whole file that lies in the folder under another name. file_id: of one that it
        takes the place of, if that is there.
        """
        with source.open("rb") as written:
            os.fsync(written.fileno())
        size = source.stat().st_size
        made = StoredFile(file_id or new_id("file"), owner, now, size, name, purpose)
        source.rename(self.place(made.id))
        self.db.execute("replace into files values (?, ?, ?, ?, ?, ?)", made)
        return made

    def file(self, owner: str, file_id: str) -> StoredFile | None:
        query = "select * from files where id = ? and owner = ?"
        row = self.db.execute(query, (file_id, owner)).fetchone()
        return None if row is None else StoredFile(*row)

    def files(self, owner: str) -> list[StoredFile]:
        """The oldest first."""
        query = "select * from files where owner = ? order by created, rowid"
        return [StoredFile(*row) for row in self.db.execute(query, (owner,))]

    def remove(self, file: StoredFile) -> None:
        self.db.execute("delete from files where id = ?", (file.id,))
        self.place(file.id).unlink(missing_ok=True)
