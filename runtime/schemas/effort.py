"""How long one schema may take to be made plain. Patterns and alternatives multiply: a schema of a
few hundred bytes can ask for hours.

Counted are the seconds that the thread itself computes, so that a busy machine refuses no schema
that an idle one takes. Knows no schema.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from enginehouse.runtime.grammar.support import SchemaError

LIMIT_S = 5.0
_END: ContextVar[float] = ContextVar("end", default=float("inf"))  # of time.thread_time()


class TooMuch(SchemaError):
    """What takes longer is refused whole: no part of it is left out instead."""


@contextmanager
def limited(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Within it, `check_effort` counts. One within another ends with it: a request's schemas have
    their time together.
    """
    token = _END.set(min(_END.get(), time.thread_time() + limit_s))
    try:
        yield
    finally:
        _END.reset(token)


def check_effort() -> None:
    """TooMuch when the time is over; to be called in every loop that a schema makes long."""
    if time.thread_time() > _END.get():
        raise TooMuch(
            f"the schema takes more than {LIMIT_S:g} s to be read: its patterns, alternatives or "
            "references multiply; make it smaller"
        )
