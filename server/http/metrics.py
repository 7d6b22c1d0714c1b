"""Prometheus text: what this worker served and what its engine reports.

Under several workers (PROMETHEUS_MULTIPROC_DIR) the request metrics of all are summed; the
engine's come from the one host they share, so any worker may tell them. This file does not know
Flask, and no metric holds any text of a request.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from enginehouse.server.answer.completion import Completion, EngineClient
from enginehouse.server.http.engine_metrics import EngineCollector
from enginehouse.server.http.metric_names import with_other_names
from enginehouse.server.observe.reasons import CANCELS, PHASES, REFUSALS, refusal_reason

CONTENT_TYPE = CONTENT_TYPE_LATEST

_GATHER_S = 0.5
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 900)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The request metrics of one worker. One object per application: tests may make many.

    other_names, model: see metric_names.py. started_s: Unix time of the server; None: now.
    """

    def __init__(
        self,
        client: EngineClient,
        other_names: tuple[str, ...] = (),
        model: str = "",
        started_s: float | None = None,
    ) -> None:
        self._other_names, self._model = other_names, model
        self._registry = registry = CollectorRegistry()
        self._engine = EngineCollector(client)
        self._start = _Start(time.time() if started_s is None else started_s)
        self._requests = Counter(
            "enginehouse_requests", "Answers of the API by status", ["status"], registry=registry
        )
        self._errors = Counter(
            "enginehouse_request_errors",
            "Refusals and failures by status and code",
            ["status", "code"],
            registry=registry,
        )
        self._refused = Counter(
            "enginehouse_requests_refused",
            "Requests that were turned away, by reason",
            ["reason"],
            registry=registry,
        )
        self._cancelled = Counter(
            "enginehouse_requests_cancelled",
            "Answers that nobody waited for to the end, by reason and by how far they had come",
            ["reason", "phase"],
            registry=registry,
        )
        for reason in REFUSALS:  # a rate wants to see a counter before its first event
            self._refused.labels(reason=reason)
        for reason, phase in product(CANCELS, PHASES):
            self._cancelled.labels(reason=reason, phase=phase)
        self._cost = Counter(
            "enginehouse_estimated_cost_dollars", "Of answers, by the prices", registry=registry
        )
        self._success = Counter(
            "enginehouse_request_success",
            "Choices that ended, by finish_reason; cancelled and error are no success",
            ["finish_reason"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "enginehouse_prompt_tokens", "Prompt tokens of answers", registry=registry
        )
        self._generation_tokens = Counter(
            "enginehouse_generation_tokens", "Tokens of answers", registry=registry
        )
        self._failed_calls = Counter(
            "enginehouse_tool_call_failures",
            "Texts that looked like calls of tools and were told as content",
            registry=registry,
        )
        self._verdicts = Counter(
            "enginehouse_schema_verdicts",
            "Answers held against a schema of which not all was enforced: valid, invalid, unknown",
            ["verdict"],
            registry=registry,
        )
        self._slow_readers = Counter(
            "enginehouse_slow_readers",
            "Answers that were cut, as their client took nothing of them",
            registry=registry,
        )
        self._time_to_first_token = Histogram(
            "enginehouse_time_to_first_token_seconds",
            "From the request to the first token",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._time_per_output_token = Histogram(
            "enginehouse_time_per_output_token_seconds",
            "Between tokens after the first, mean of a request",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._inter_token_latency = _GatheredHistogram(
            "enginehouse_inter_token_latency_seconds",
            "Between two pieces of an answer",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._queue_time = Histogram(
            "enginehouse_request_queue_time_seconds",
            "From an engine's queue to its batch, of requests that got a token",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._e2e_latency = Histogram(
            "enginehouse_e2e_request_latency_seconds",
            "From the request to its last token",
            buckets=_LATENCY_S,
            registry=registry,
        )

    def count_answer(self, status: int) -> None:
        self._requests.labels(status=str(status)).inc()

    def count_error(self, status: int, code: str | None, is_probe: bool = False) -> None:
        """A refusal or a failure, in mid-stream too. is_probe: a monitor's, which is turned away
        from nothing.
        """
        self._errors.labels(status=str(status), code=code or "").inc()
        if not is_probe and (reason := refusal_reason(status, code)):
            self.count_refused(reason)

    def count_refused(self, reason: str) -> None:
        """reason: one of REFUSALS."""
        self._refused.labels(reason=reason).inc()

    def count_cancelled(self, reason: str, phase: str) -> None:
        """One of CANCELS, and one of PHASES."""
        self._cancelled.labels(reason=reason, phase=phase).inc()

    def observe_gap(self, seconds: float) -> None:
        self._inter_token_latency.gather(seconds)

    def count_verdict(self, verdict: str) -> None:
        self._verdicts.labels(verdict=verdict).inc()

    def count_slow_reader(self) -> None:
        self._slow_readers.inc()

    def count_completion(self, completion: Completion) -> None:
        """Count an answer at its end, whole or not."""
        self._inter_token_latency.tell()
        for choice in completion.choices:
            reason = choice.finish_reason or completion.unfinished_reason
            self._success.labels(finish_reason=reason).inc()
            self._failed_calls.inc(choice.parser.num_failed)
        num_tokens = completion.num_completion_tokens
        self._prompt_tokens.inc(completion.num_prompt_tokens)
        self._generation_tokens.inc(num_tokens)
        self._cost.inc(completion.terms.prices.cost(completion.num_prompt_tokens, num_tokens))
        if completion.queued_s is not None:
            self._queue_time.observe(completion.queued_s)
        started_s, first_s, finished_s = (
            completion.started_s,
            completion.first_token_s,
            completion.finished_s,
        )
        if first_s is not None:
            self._time_to_first_token.observe(first_s - started_s)
        if finished_s is not None:
            self._e2e_latency.observe(finished_s - started_s)
        if first_s is not None and finished_s is not None:
            per_choice = num_tokens / len(completion.choices)
            if per_choice > 1:
                self._time_per_output_token.observe((finished_s - first_s) / (per_choice - 1))

    def render(self) -> bytes:
        """The text of one scrape."""
        self._inter_token_latency.tell()
        registries = with_other_names(self._registries(), self._other_names, self._model)
        return b"".join(map(generate_latest, registries))

    def _registries(self) -> Iterator[CollectorRegistry]:
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            workers = CollectorRegistry()
            MultiProcessCollector(workers)  # type: ignore[no-untyped-call]
            yield workers
        else:
            yield self._registry
        engine = CollectorRegistry()
        engine.register(self._start)
        engine.register(self._engine)
        yield engine


class _GatheredHistogram(Histogram):
    """Observations of every token are gathered, and told at once: under several workers a histogram
    is a file, and each observation two writes to it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told_s = time.monotonic()
        self._counts = [0] * len(self._upper_bounds)
        self._seconds = 0.0

    def gather(self, seconds: float) -> None:
        self._counts[bisect_left(self._upper_bounds, seconds)] += 1
        self._seconds += seconds
        if time.monotonic() - self._told_s > _GATHER_S:
            self.tell()

    def tell(self) -> None:
        self._told_s = time.monotonic()
        for index, count in enumerate(self._counts):
            if count:
                self._buckets[index].inc(count)
                self._counts[index] = 0
        self._sum.inc(self._seconds)
        self._seconds = 0.0


class _Start(Collector):
    """The server's start: no worker's own, so that no file of a worker holds it."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s

    def collect(self) -> Iterable[Metric]:
        text = "Unix time at which the server started"
        yield GaugeMetricFamily("enginehouse_start_time_seconds", text, value=self._started_s)
