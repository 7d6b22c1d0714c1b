"""A server that logs JSON: each line of its master, workers and host is an object."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from makers.gunicorn_server import MESSAGES, Server, wait_until

SECRET, SAID = "sk-secret-of-a-test", "What is the time?"


@pytest.fixture
def json_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_LOG_FORMAT", "json")
    monkeypatch.setenv("ENGINEHOUSE_ACCESS_LOG", "1")
    monkeypatch.setenv("ENGINEHOUSE_API_KEYS", f"front {SECRET}")


def lines(log: Path) -> list[dict[str, Any]]:
    """All of it, or JSONDecodeError."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_all_processes_write_objects_and_a_request_is_found_by_its_fields(
    json_log: None, engine: Path, tmp_path: Path
) -> None:
    server = Server(engine, tmp_path / "log")
    headers = {"Authorization": f"Bearer {SECRET}", "X-Request-Id": "client-7"}
    body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 3}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json=body)
        odd = client.get("/v1/models", headers={"X-Request-Id": 'a"b {}'}).headers["X-Request-Id"]
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (200, "client-7")
    host = server.host_pid()
    assert host is not None
    os.kill(host, signal.SIGKILL)
    wait_until(lambda: server.host_pid() not in (None, host), "another host")
    wait_until(server.is_ready, "ready again")
    workers = {p.pid for p in psutil.Process(server.process.pid).children()} - {server.host_pid()}
    assert server.stop() == 0
    told = lines(server.log)
    assert all({"time", "level", "logger", "process", "event"} <= set(line) for line in told)
    assert {server.process.pid} | workers <= {line["process"] for line in told}
    gunicorns = {line["process"] for line in told if line["logger"] == "gunicorn.error"}
    assert {server.process.pid} | workers <= gunicorns
    [asked] = [line for line in told if line.get("path") == "/v1/chat/completions"]
    wanted = {"request_id": "client-7", "key": "front", "model": "tiny-llama", "status": 200}
    assert {name: asked[name] for name in wanted} == wanted and asked["seconds"] > 0
    assert any(line.get("request_id") == odd for line in told) and odd.isalnum()
    assert [line["url"] for line in told if line["event"] == "ready"] == [server.url] * 2
    text = server.log.read_text()
    assert SECRET not in text and SAID not in text


def test_why_a_server_cannot_start_is_an_object_too(
    json_log: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        Server(tmp_path / "nothing", tmp_path / "log")
    *_, last = lines(tmp_path / "log")
    assert last["level"] == "critical" and "nothing is not a directory" in last["event"]
    monkeypatch.setenv("ENGINEHOUSE_LOG_LEVEL", "loud")
    with pytest.raises(AssertionError):
        Server(tmp_path / "nothing", tmp_path / "log")
    [only] = lines(tmp_path / "log")
    assert only["event"] == "ENGINEHOUSE_LOG_LEVEL='loud'; wanted debug, info, warning, error"
