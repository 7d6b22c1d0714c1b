"""What a key may ask in a minute and at once: 429 beyond it, and OpenAI's headers on every answer.

Windows of a minute are `limits`' fixed ones, over all workers. Tokens are counted once they are
known, at an answer's end: a key whose minute is used up is refused, and never cut off.
Source: OpenAI's API reference, "Rate limits in headers".
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Iterator
from typing import NoReturn

from limits import RateLimitItemPerMinute
from limits.strategies import FixedWindowRateLimiter

from enginehouse.runtime.errors import RequestError
from enginehouse.server.api_keys import ApiKey
from enginehouse.server.http.shared_counts import SharedCounts

LOG = logging.getLogger("enginehouse.server")
HEADERS = tuple(
    f"x-ratelimit-{part}-{what}"
    for what in ("requests", "tokens")
    for part in ("limit", "remaining", "reset")
)
_BUSY_S = 1  # when a request beside others may come again: nobody knows when they end


class RateLimits:
    """Of all keys; `counts` is shared by the workers."""

    def __init__(self, counts: SharedCounts) -> None:
        self._counts = counts
        self._windows = FixedWindowRateLimiter(counts)

    def ticket(self, key: ApiKey) -> Ticket:
        return Ticket(key, self._counts, self._windows)


class Ticket:
    """One request of a key, until `end`."""

    def __init__(self, key: ApiKey, counts: SharedCounts, windows: FixedWindowRateLimiter) -> None:
        self._key = key
        self._id = key.digest.hex()
        self._counts = counts
        self._windows = windows
        limits = key.limits
        self._items = {
            what: RateLimitItemPerMinute(most)
            for what, most in (("requests", limits.rpm), ("tokens", limits.tpm))
            if most is not None
        }
        self._open = False

    def begin(self) -> None:
        """Count the request. Raises RequestError 429."""
        try:
            self._begin()
        except sqlite3.Error as error:  # the file is taken: better one too many than none
            LOG.warning("a key's requests are not counted: %s", error)

    def _begin(self) -> None:
        if "tokens" in self._items and not self._remaining("tokens"):
            self._refuse("tokens", self._key.limits.tpm)
        if not self._counts.open(self._id, self._key.limits.concurrent):
            raise RequestError(
                f"{self._key.limits.concurrent} requests of this key run already, and no more may; "
                "wait for one to end",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=_BUSY_S,
            )
        self._open = True
        item = self._items.get("requests")
        if item is not None and not self._windows.hit(item, self._id, "requests"):
            self.end(0)
            self._refuse("requests", self._key.limits.rpm)

    def end(self, num_tokens: int) -> None:
        """Once; more calls do nothing."""
        if not self._open:
            return
        self._open = False
        self._counts.close(self._id)
        item = self._items.get("tokens")
        if item is None or not num_tokens:
            return
        try:
            self._counts.incr(item.key_for(self._id, "tokens"), item.get_expiry(), num_tokens)
        except sqlite3.Error as error:
            LOG.warning("a key's tokens are not counted: %s", error)

    def headers(self) -> Iterator[tuple[str, str]]:
        """x-ratelimit-*, of the limits that this key has."""
        for what, item in self._items.items():
            yield f"x-ratelimit-limit-{what}", str(item.amount)
            yield f"x-ratelimit-remaining-{what}", str(self._remaining(what))
            yield f"x-ratelimit-reset-{what}", f"{self._reset_s(what)}s"

    def _remaining(self, what: str) -> int:
        item = self._items[what]
        used = self._counts.get(item.key_for(self._id, what))
        return max(0, item.amount - used)

    def _reset_s(self, what: str) -> int:
        expires = self._counts.get_expiry(self._items[what].key_for(self._id, what))
        return max(0, math.ceil(expires - time.monotonic()))

    def _refuse(self, what: str, most: int | None) -> NoReturn:
        seconds = max(1, self._reset_s(what))
        raise RequestError(
            f"this key may ask {most} {what} a minute, and has; send the request again in "
            f"{seconds} s",
            code="rate_limit_exceeded",
            status=429,
            retry_after_s=seconds,
        )
