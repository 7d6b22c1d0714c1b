"""The engine's own figures as Prometheus has them, read at the moment of a scrape.

They come from the hosts that all workers share. Knows no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Protocol, runtime_checkable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.request import ExecutorStats
from enginehouse.server.answer.completion import EngineClient

_BUILD = ("version", "model", "quantization", "backend", "tp_size", "pp_size", "digest")
_READY = "1 when the engine takes requests"
Row = tuple[str, str, float]  # name, what it is, value


@runtime_checkable
class Replicated(Protocol):
    """A client of several engines; see server/replicas/clients.py."""

    def replicas(self) -> Mapping[str, EngineClient]: ...


class EngineCollector(Collector):
    """The engine's latest stats; of several replicas each one's, under its name as a label."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        replicas = self._client.replicas() if isinstance(self._client, Replicated) else None
        labels = [] if replicas is None else ["replica"]
        clients = {"": self._client} if replicas is None else replicas
        families: dict[str, Metric] = {}
        for replica, client in clients.items():
            values = [] if replicas is None else [replica]
            for name, text, value in (*_gauges(client), *_kv_cache_bytes(client)):
                gauge = GaugeMetricFamily(f"enginehouse_{name}", text, labels=labels)
                families.setdefault(name, gauge).add_metric(values, value)  # type: ignore[attr-defined]
            for name, text, value in _counters(client.stats):
                counter = CounterMetricFamily(f"enginehouse_{name}", text, labels=labels)
                families.setdefault(name, counter).add_metric(values, value)  # type: ignore[attr-defined]
        if not clients:
            yield GaugeMetricFamily("enginehouse_ready", _READY, value=0)
        yield from families.values()
        yield from self._build()

    def _build(self) -> Iterator[Metric]:
        """1, with what is served as its labels."""
        try:
            info = self._client.info
        except HostUnavailable:
            return
        values = [version("enginehouse"), *(str(getattr(info, name)) for name in _BUILD[1:])]
        family = GaugeMetricFamily("enginehouse_build_info", "What is served", labels=_BUILD)
        family.add_metric(values, 1)
        yield family


def _gauges(client: EngineClient) -> Iterator[Row]:
    stats = client.stats
    num_used = stats.num_kv_blocks - stats.num_free_kv_blocks
    yield "ready", _READY, int(client.ready)
    yield "num_requests_running", "Sequences in the batch", stats.num_running
    yield "num_requests_waiting", "Sequences that wait for a place", stats.num_waiting
    yield "kv_cache_blocks", "Blocks of the KV cache", stats.num_kv_blocks
    yield "kv_cache_blocks_free", "Blocks that no sequence holds", stats.num_free_kv_blocks
    ratio = num_used / max(1, stats.num_kv_blocks)
    yield "kv_cache_usage_ratio", "Share that sequences hold", ratio


def _kv_cache_bytes(client: EngineClient) -> Iterator[Row]:
    """How far the KV cache can go, and what it is at, on each GPU or on the CPU."""
    stats = client.stats
    try:
        limit = client.info.kv_cache_bytes
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


def _counters(stats: ExecutorStats) -> Iterator[Row]:
    yield "iterations", "Steps of the engine", stats.num_iterations
    if stats.iterations_s is not None and stats.num_in_iterations is not None:
        yield "iteration_seconds", "What all steps took", stats.iterations_s
        text = "Sequences of each step, summed: by steps, the mean batch"
        yield "iteration_sequences", text, stats.num_in_iterations
    yield "preemptions", "Sequences put back to free blocks", stats.num_preemptions
    text = "Prompt tokens found in the KV cache"
    yield "cached_prompt_tokens", text, stats.num_cached_tokens
    text = "Prompt tokens computed, of all clients"
    yield "engine_prompt_tokens", text, stats.num_prompt_tokens
    yield "engine_generation_tokens", "Tokens of all clients", stats.num_generated_tokens
    yield "spec_decode_num_draft_tokens", "Tokens drafted", stats.num_draft_tokens
    text = "Drafted tokens that were right"
    yield "spec_decode_num_accepted_tokens", text, stats.num_accepted_tokens
