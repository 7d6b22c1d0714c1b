"""What fuzzers share: how many examples they try, JSON of any kind, and damage to bytes.

ENGINEHOUSE_FUZZ multiplies the examples and draws new ones each time (`make fuzz`); without it the
same few are tried, so that a test suite is the same twice.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

FACTOR = float(os.environ.get("ENGINEHOUSE_FUZZ") or 1)


def tries(num_examples: int) -> settings:
    """So many examples, or as many times more as the environment asks for."""
    phases = [Phase.explicit, Phase.generate, Phase.shrink]
    return settings(
        max_examples=max(1, round(num_examples * FACTOR)),
        deadline=None,
        database=None,
        derandomize=FACTOR == 1,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


HUGE = [2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, *HUGE, *(-n for n in HUGE)]),
    st.integers(-10, 300),
    st.floats(),  # NaN and infinities too
)
# Every code point, half surrogates too: JSON can spell them, UTF-8 cannot.
WORDS = st.one_of(
    st.sampled_from(["", "a", "\x00", "\n", "\ud800", "\udc00a", "é", "🙂", "../x", "$ref", "%n"]),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.builds(lambda text, count: text * count, st.text(max_size=3), st.integers(0, 3000)),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)


def nested(levels: int, as_list: bool) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if as_list else {"a": value}
    return value


# Lists and objects of anything, up to hundreds of levels or thousands of items.
VALUES: st.SearchStrategy[Any] = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)
        ),
        max_leaves=8,
    ),
    st.builds(nested, st.integers(1, 400), st.booleans()),
    st.builds(lambda item, count: [item] * count, LEAVES, st.integers(0, 3000)),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) of a JSON value, so that any place can be given another value."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                waiting.append(item[key])
    return found


@st.composite
def changed(draw: st.DrawFn, good: Any, others: st.SearchStrategy[Any] = VALUES) -> Any:
    """A copy of a JSON object in which a few places hold something else, are gone, or stand twice
    under other names.
    """
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        at = places(value)
        if not at:
            return value
        container, key = draw(st.sampled_from(at))
        match draw(st.sampled_from(["other", "other", "gone", "more"])):
            case "gone":
                del container[key]
            case "more" if isinstance(container, dict):
                container[draw(WORDS)] = container[key]
            case _:
                container[key] = draw(others)
    return value


@st.composite
def damaged(draw: st.DrawFn, good: bytes, head: int | None = None) -> bytes:
    """The bytes with a few flipped, cut out, doubled or overwritten by numbers that are too large.

    head: most of the damage lies within so many of them, as it does in a file's header.
    """
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        last = len(data) if head is None or draw(st.integers(0, 9)) == 0 else min(head, len(data))
        if not data:
            break
        place = draw(st.integers(0, max(0, last - 1)))
        match draw(st.sampled_from(["flip", "number", "cut", "drop", "double", "digits"])):
            case "flip":
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "number":
                size = draw(st.sampled_from([1, 2, 4, 8]))
                most = 1 << 8 * size
                number = draw(st.sampled_from([0, 1, most - 1, most // 2, most // 2 - 1, 1 << 40]))
                data[place : place + size] = (number % most).to_bytes(size, "little")
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + draw(st.integers(1, 64))]
            case "double":
                piece = data[place : place + draw(st.integers(1, 64))]
                data[place:place] = piece
            case "digits":
                digits = [i for i in range(place, min(place + 400, last)) if 48 <= data[i] < 58]
                if digits:
                    text = draw(st.sampled_from([b"-1", b"9" * 19, b"9" * 4000, b"1e9", b"0.5"]))
                    data[digits[0] : digits[0] + 1] = text
    return bytes(data)


def files_like(good: bytes) -> st.SearchStrategy[bytes]:
    """A file as it is damaged: of bytes, and where it is small and JSON, of values."""
    ways: list[st.SearchStrategy[bytes]] = [damaged(good, 4000)]
    try:
        data = json.loads(good)
    except ValueError:
        data = None
    if isinstance(data, (dict, list)) and len(good) < 20_000:
        ways += [changed(data).map(lambda value: json.dumps(value).encode())] * 2
    return st.one_of(ways)


@contextmanager
def little_memory(more_bytes: int = 1 << 30) -> Iterator[None]:
    """MemoryError for who asks for much more than there is now: what a file says is no reason."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
