"""A SQLite file that the workers of one server share: opened, and changed in transactions.

Knows no table. Source: SQLite's documentation, "Write-Ahead Logging" and "PRAGMA".
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# What is kept outlives a process that is killed; the last moments before the power fails may not.
KEPT = ("journal_mode=wal", "synchronous=normal")
# Nothing outlives the server: the disk is not waited for.
PASSING = ("journal_mode=memory", "synchronous=off")


def opened(
    path: Path | str, tables: str, pragmas: Sequence[str], wait_s: float
) -> sqlite3.Connection:
    """`:memory:` is this process's own. tables: SQL that makes what is not there yet. wait_s: for
    another worker, in which this one's event loop stands.
    """
    made = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
    for pragma in pragmas:
        made.execute(f"pragma {pragma}")
    made.executescript(tables)
    return made


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing of it."""
    db.execute("begin immediate")
    try:
        yield
    except BaseException:
        db.execute("rollback")
        raise
    db.execute("commit")
