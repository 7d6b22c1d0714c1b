"""What came of a run: rates, times and shares of its requests. Knows no replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benches.figures import percentile

from fleet.workload import Request


class Outcome(NamedTuple):
    """Of requests that came between warm_s and seconds. Times in seconds; waits: until the first
    token. busiest: the share of requests at the replica that had most, over the mean.
    """

    requests: int
    answered: int
    errors: int
    retries: int
    tokens_per_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    total_mean_s: float
    hit_rate: float
    busiest: float


def outcome_of(requests: Sequence[Request], warm_s: float, seconds: float) -> Outcome:
    """hit_rate: of all prompt tokens that were admitted, those that were there. ValueError where no
    request was answered.
    """
    counted = [request for request in requests if warm_s <= request.arrived_s]
    good = [request for request in counted if request.done_s is not None and not request.error]
    if not good:
        raise ValueError("no request was answered; ask for more of them, or for more seconds")
    ttft = [r.first_token_s - r.arrived_s for r in good if r.first_token_s is not None]
    prompt = sum(request.prompt_tokens for request in good)
    per_replica = Counter(request.replica for request in good)
    inside = [r for r in requests if r.done_s is not None and warm_s <= r.done_s < seconds]
    return Outcome(
        requests=len(counted),
        answered=len(good),
        errors=sum(request.error is not None for request in counted),
        retries=sum(request.retries for request in counted),
        tokens_per_s=sum(request.answer_tokens for request in inside) / (seconds - warm_s),
        ttft_mean_s=sum(ttft) / len(ttft),
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p99_s=percentile(ttft, 0.99),
        total_mean_s=sum(r.done_s - r.arrived_s for r in good if r.done_s is not None) / len(good),
        hit_rate=sum(request.cached_tokens for request in good) / prompt,
        busiest=max(per_replica.values()) / (len(good) / len(per_replica)),
    )
