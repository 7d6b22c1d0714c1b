"""A server's workers trace: to a collector that listens, and to one that hangs."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from doubles.otlp_collector import attributes, collecting
from makers.gunicorn_server import MESSAGES, Server, wait_until

BODY = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 3}


def test_an_engine_s_own_queue_and_prefill_reach_the_collector(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv("ENGINEHOUSE_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
        server = Server(engine, tmp_path / "log")
        for stream in (False, True):
            answer = httpx.post(
                f"{server.url}/v1/chat/completions", json={**BODY, "stream": stream}, timeout=60
            )
            assert answer.status_code == 200 and '"error"' not in answer.text, answer.text
        assert server.stop() == 0, "what waits is sent before the worker ends"
        names = sorted(span.name for span in collector.spans)
        each = ["POST /v1/chat/completions", "chat tiny-llama", "decode", "prefill", "queue"]
        assert names == sorted(each * 2)
        told = [attributes(span) for span in collector.spans if span.name == "chat tiny-llama"]
        assert [span["gen_ai.usage.output_tokens"] for span in told] == [3, 3]
        assert {sent["service.name"] for sent in collector.resources} == {"chat"}


def test_a_collector_that_hangs_holds_no_answer_up_and_no_worker(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would, for ten minutes, if exporting stood in anybody's way."""
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        monkeypatch.setenv(
            "ENGINEHOUSE_OTLP_ENDPOINT", f"http://127.0.0.1:{hangs.getsockname()[1]}"
        )
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        server = Server(engine, tmp_path / "log")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.post("/v1/chat/completions", json=BODY).status_code == 200
            hangs.settimeout(60)
            exporting, _ = hangs.accept()
            with exporting:
                assert exporting.recv(4) == b"POST", "it is being exported, and is not answered"
                for _ in range(5):
                    assert client.post("/v1/chat/completions", json=BODY).status_code == 200
                wait_until(lambda: "Queue full" in server.log.read_text(), "what is lost is told")
                assert server.stop() == 0
