"""Prometheus text: what this worker served and what its engine reports.

Under several workers (PROMETHEUS_MULTIPROC_DIR) the request metrics of all are summed; the
engine's come from the one host they share, so any worker may tell them. This file does not know
Flask, and no metric holds any text of a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.request import ExecutorStats
from enginehouse.server.answer.completion import Completion, EngineClient

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 900)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class EngineCollector(Collector):
    """The engine's latest stats, read at the moment of a scrape."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        stats = self._client.stats
        num_used = stats.num_kv_blocks - stats.num_free_kv_blocks
        gauges = (
            ("ready", "1 when the engine takes requests", int(self._client.ready)),
            ("num_requests_running", "Sequences in the batch", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a place", stats.num_waiting),
            ("kv_cache_blocks", "Blocks of the KV cache", stats.num_kv_blocks),
            ("kv_cache_blocks_free", "Blocks that no sequence holds", stats.num_free_kv_blocks),
            (
                "kv_cache_usage_ratio",
                "Share that sequences hold",
                num_used / max(1, stats.num_kv_blocks),
            ),
            *self._kv_cache_bytes(stats),
        )
        counters = (
            ("iterations", "Steps of the engine", stats.num_iterations),
            ("preemptions", "Sequences put back to free blocks", stats.num_preemptions),
            (
                "cached_prompt_tokens",
                "Prompt tokens found in the KV cache",
                stats.num_cached_tokens,
            ),
            (
                "engine_prompt_tokens",
                "Prompt tokens computed, of all clients",
                stats.num_prompt_tokens,
            ),
            ("engine_generation_tokens", "Tokens of all clients", stats.num_generated_tokens),
            ("spec_decode_num_draft_tokens", "Tokens drafted", stats.num_draft_tokens),
            (
                "spec_decode_num_accepted_tokens",
                "Drafted tokens that were right",
                stats.num_accepted_tokens,
            ),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"enginehouse_{name}", text, value=value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"enginehouse_{name}", text, value=value)

    def _kv_cache_bytes(self, stats: ExecutorStats) -> Iterator[tuple[str, str, float]]:
        """How far the KV cache can go, and what it is at, on each GPU or on the CPU."""
        try:
            limit = self._client.info.kv_cache_bytes
        except HostUnavailable:
            return
        yield "kv_cache_limit_bytes", "What keys and values take at most", limit
        if stats.num_kv_blocks:
            block_bytes = limit / stats.num_kv_blocks
            held = (stats.num_kv_blocks - stats.num_free_kv_blocks) * block_bytes
            yield "kv_cache_sequence_bytes", "Keys and values that sequences hold", held
            if stats.num_remembered_kv_blocks is not None:
                kept = stats.num_remembered_kv_blocks * block_bytes
                yield "kv_cache_prefix_bytes", "Keys and values kept until others need room", kept


class Metrics:
    """The request metrics of one worker. One object per application: tests may make many."""

    def __init__(self, client: EngineClient) -> None:
        self._registry = registry = CollectorRegistry()
        self._engine = EngineCollector(client)
        self._requests = Counter(
            "enginehouse_requests", "Answers of the API by status", ["status"], registry=registry
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
        self._e2e_latency = Histogram(
            "enginehouse_e2e_request_latency_seconds",
            "From the request to its last token",
            buckets=_LATENCY_S,
            registry=registry,
        )

    def count_answer(self, status: int) -> None:
        self._requests.labels(status=str(status)).inc()

    def count_verdict(self, verdict: str) -> None:
        self._verdicts.labels(verdict=verdict).inc()

    def count_completion(self, completion: Completion) -> None:
        """Count an answer at its end, whole or not."""
        for choice in completion.choices:
            reason = choice.finish_reason or completion.unfinished_reason
            self._success.labels(finish_reason=reason).inc()
            self._failed_calls.inc(choice.parser.num_failed)
        num_tokens = completion.num_completion_tokens
        self._prompt_tokens.inc(completion.num_prompt_tokens)
        self._generation_tokens.inc(num_tokens)
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
        return b"".join(generate_latest(registry) for registry in self._registries())

    def _registries(self) -> Iterator[CollectorRegistry]:
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            workers = CollectorRegistry()
            MultiProcessCollector(workers)  # type: ignore[no-untyped-call]
            yield workers
        else:
            yield self._registry
        engine = CollectorRegistry()
        engine.register(self._engine)
        yield engine
