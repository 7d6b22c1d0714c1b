"""What a number of clients gave over all rounds: rates, times, and how equal the texts are.

In bfloat16 a batch may round differently, so a text may part late from the one given alone: that is
told as the share of the text that is equal. Pure arithmetic; knows no server.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from enginehouse.server.client.load import Round
from enginehouse.server.client.stream_reader import Stream


@dataclass(frozen=True, slots=True)
class Level:
    """Milliseconds; None where nothing came. ttft: time to the first token."""

    clients: int
    tokens_per_s: float
    tokens_per_s_of_rounds: list[float]
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    num_tokens: int
    streams: int
    broken: int
    equal: int
    different: int
    common_share_mean: float | None
    common_share_min: float | None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def common_share(text: str, other: str) -> float:
    """How much of the longer text is a beginning that both have, 0 to 1."""
    longest = max(len(text), len(other))
    return len(os.path.commonprefix([text, other])) / longest if longest else 1.0


def summarise(rounds: Sequence[Round], alone: Sequence[Stream]) -> Level:
    """alone: the stream of each client's prompt when it was the only one."""
    pairs = [
        (stream, wanted)
        for one in rounds
        for stream, wanted in zip(one.streams, alone, strict=False)
        if stream is not None
    ]
    num_asked = sum(len(one.streams) for one in rounds)
    times = [stream.piece_times_s for stream, _ in pairs]
    firsts = [1000 * pieces[0] for pieces in times if pieces]
    gaps = [1000 * (b - a) for pieces in times for a, b in zip(pieces, pieces[1:], strict=False)]
    shares = [common_share(stream.text, wanted.text) for stream, wanted in pairs]
    equal = sum(stream.text == wanted.text for stream, wanted in pairs)
    rates = [one.tokens_per_s for one in rounds]
    return Level(
        clients=len(rounds[0].streams),
        tokens_per_s=statistics.median(rates),
        tokens_per_s_of_rounds=rates,
        ttft_p50_ms=percentile(firsts, 0.5),
        ttft_p99_ms=percentile(firsts, 0.99),
        inter_token_p50_ms=percentile(gaps, 0.5),
        inter_token_p99_ms=percentile(gaps, 0.99),
        num_tokens=sum(stream.num_tokens for stream, _ in pairs),
        streams=num_asked,
        broken=num_asked - len(pairs),
        equal=equal,
        different=len(pairs) - equal,
        common_share_mean=statistics.fmean(shares) if shares else None,
        common_share_min=min(shares, default=None),
    )
