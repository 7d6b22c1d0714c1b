"""KL divergence from a few log probabilities of each side, and where greedy answers part.

Of a distribution a server tells the likeliest tokens. What both sides tell is compared token by
token, all else as one: that is the divergence of a coarser distribution, so never more than the
true one (the data processing inequality; Cover and Thomas, Elements of Information Theory, 2.8).
Knows no server.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Token = TypeVar("Token", bound=Hashable)
_LEAST = 1e-12  # of what is left over, whose float is a difference
_FARTHEST = 1000.0  # nats: of what is no distribution, as where a server tells NaN


def kl_of_tops(truth: Mapping[Token, float], other: Mapping[Token, float]) -> float:
    """KL(truth || other), nats, of log probabilities by token; never more than 1000, which is told
    of what is no distribution at all.
    """
    if any(not value < 0.01 for value in (*truth.values(), *other.values())):  # NaN is not either
        return _FARTHEST
    shared = truth.keys() & other.keys()
    kl, left, other_left = 0.0, 1.0, 1.0
    for token in sorted(shared, key=lambda token: -truth[token]):
        p, q = math.exp(truth[token]), math.exp(other[token])
        kl += p * (truth[token] - other[token]) if p else 0.0
        left -= p
        other_left -= q
    left, other_left = max(left, _LEAST), max(other_left, _LEAST)
    return min(max(0.0, kl + left * math.log(left / other_left)), _FARTHEST)


class Parting(NamedTuple):
    """Where two greedy answers part: the place of the first token that differs, None where none
    does. tie: nats between the old's token and the new's, as the old saw them. at_least: the same,
    where the old told only that it is no less: the new's is not among its likeliest, or one of the
    two ended.
    """

    place: int | None
    tie: float | None = None
    at_least: float = 0.0


def first_parting(
    old: Sequence[str], new: Sequence[str], old_top: Sequence[Mapping[str, float]]
) -> Parting:
    """Of tokens by their text; top: the old's log probabilities at each."""
    for index, (before, after) in enumerate(zip(old, new, strict=False)):
        if before != after:
            seen = old_top[index] if index < len(old_top) else {}
            if before in seen and after in seen:
                return Parting(index, seen[before] - seen[after])
            return Parting(index, None, seen[before] - min(seen.values()) if before in seen else 0)
    if len(old) != len(new):
        return Parting(min(len(old), len(new)))
    return Parting(None)


def answer_kl(
    old: Sequence[str],
    new: Sequence[str],
    old_top: Sequence[Mapping[str, float]],
    new_top: Sequence[Mapping[str, float]],
) -> list[float]:
    """KL(old || new) at each token of two greedy answers, as long as both saw the same text."""
    place = first_parting(old, new, old_top).place
    seen = min(len(old_top), len(new_top))
    if place is not None:
        seen = min(seen, place + 1)  # where they part, both had read the same
    return [kl_of_tops(old_top[i], new_top[i]) for i in range(seen)]
