"""Texts of /metrics -> what a server does now, and what it did between two of them.

Knows Prometheus' text format, its way with counters that begin again, and enginehouse's names; no
HTTP and no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from enginehouse.runtime.errors import EnginehouseError

_OURS = "enginehouse_"


class NoMetrics(EnginehouseError):
    """A text that no enginehouse server tells."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One text of /metrics. at_s: when it was read (seconds, any origin)."""

    at_s: float
    samples: Mapping[str, list[Sample]]

    def value(self, name: str) -> float | None:
        """All its series together; None where there is none."""
        found = self.samples.get(_OURS + name)
        return None if found is None else sum(sample.value for sample in found)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Summed by the values of those labels."""
        sums: dict[tuple[str, ...], float] = {}
        for sample in self.samples.get(_OURS + name, ()):
            key = tuple(sample.labels.get(label, "") for label in labels)
            sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def labels(self, name: str) -> Mapping[str, str]:
        """Of its first series."""
        found = self.samples.get(_OURS + name)
        return found[0].labels if found else {}


def parse_scrape(text: str, at_s: float) -> Scrape:
    """Raises NoMetrics for a text that has no metric of an enginehouse server."""
    samples: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample)
    except (ValueError, IndexError, KeyError):
        samples.clear()
    if f"{_OURS}ready" not in samples:
        raise NoMetrics("no metric of an enginehouse server is told there")
    return Scrape(at_s, samples)


class Interval(NamedTuple):
    """Between two scrapes of one server."""

    before: Scrape
    now: Scrape

    @property
    def seconds(self) -> float:
        return self.now.at_s - self.before.at_s

    def increase(self, name: str) -> float:
        """Of a counter; one that is smaller than it was has begun again at 0."""
        return sum(self.increases(name).values())

    def increases(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        before = self.before.by(name, *labels)
        return {
            key: value - before.get(key, 0.0) if value >= before.get(key, 0.0) else value
            for key, value in self.now.by(name, *labels).items()
        }

    def rate(self, name: str) -> float:
        """A second."""
        return self.increase(name) / self.seconds

    def quantile(self, histogram: str, share: float) -> float | None:
        """What that share of the interval's observations did not exceed, as Prometheus'
        histogram_quantile interpolates it; None where nothing was observed, infinity where it lies
        beyond the last bound.
        """
        found = self.increases(f"{histogram}_bucket", "le")
        bounds = sorted((float(bound), count) for (bound,), count in found.items())
        if not bounds or bounds[-1][1] <= 0:
            return None
        rank = share * bounds[-1][1]
        low, below = 0.0, 0.0
        for bound, count in bounds:
            if count >= rank and count > below:
                if math.isinf(bound):
                    return math.inf
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return math.inf


class Latency(NamedTuple):
    """Seconds, of an interval."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What is told of one moment; rates and quantiles are those of the interval before it."""

    num_running: float
    num_waiting: float
    num_blocks: float
    num_held: float
    hit_share: float | None
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token: Latency
    inter_token: Latency
    queue: Latency
    ended: Mapping[tuple[str, ...], float]
    refused: Mapping[tuple[str, ...], float]


def figures_of(interval: Interval) -> Figures:
    now = interval.now
    blocks = now.value("kv_cache_blocks") or 0.0
    computed = interval.increase("engine_prompt_tokens_total")
    found = interval.increase("cached_prompt_tokens_total")

    def latency(histogram: str) -> Latency:
        return Latency(interval.quantile(histogram, 0.5), interval.quantile(histogram, 0.99))

    return Figures(
        num_running=now.value("num_requests_running") or 0.0,
        num_waiting=now.value("num_requests_waiting") or 0.0,
        num_blocks=blocks,
        num_held=blocks - (now.value("kv_cache_blocks_free") or 0.0),
        hit_share=found / (found + computed) if found + computed else None,
        prompt_tokens_per_s=(found + computed) / interval.seconds,
        output_tokens_per_s=interval.rate("engine_generation_tokens_total"),
        first_token=latency("time_to_first_token_seconds"),
        inter_token=latency("inter_token_latency_seconds"),
        queue=latency("request_queue_time_seconds"),
        ended=interval.increases("request_success_total", "finish_reason"),
        refused=interval.increases("request_errors_total", "status", "code"),
    )
