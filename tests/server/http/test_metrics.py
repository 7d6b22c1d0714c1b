"""Histograms of every token, which are gathered before they are told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from doubles.scripted_client import ScriptedClient
from enginehouse.server.http import metrics
from makers.text_engine import engine_info

NAME = "enginehouse_inter_token_latency_seconds"


def test_what_is_gathered_is_told_as_a_histogram_tells_it() -> None:
    told = metrics.Metrics(ScriptedClient(engine_info()))
    registry = CollectorRegistry()
    plain = Histogram(NAME, "-", buckets=metrics._TOKEN_S, registry=registry)
    for seconds in (0.0, *metrics._TOKEN_S, 0.003, 0.02, 0.02, 2.6, 1e9):
        told.observe_gap(seconds)
        plain.observe(seconds)

    def lines(text: bytes) -> list[str]:
        return [
            line
            for line in text.decode().splitlines()
            if line.startswith(NAME) and "_created" not in line
        ]

    for _ in range(2):  # nothing is told twice
        assert lines(told.render()) == lines(generate_latest(registry))
