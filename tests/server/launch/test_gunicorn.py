"""The whole of it: gunicorn, its workers, the engine host, and OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from enginehouse.server.observe.reasons import PHASES
from makers.engines import ENDLESS, build_endless_engine
from makers.gunicorn_server import DEADLINE_S, MESSAGES, Server, wait_until


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(engine, tmp_path_factory.mktemp("gunicorn") / "log", workers=2)
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


LONG = {"max_tokens": ENDLESS - 192, "temperature": 0.0}


def long_stream(client: openai.OpenAI, **other: int) -> openai.Stream[Any]:
    """One that has begun."""
    stream = client.chat.completions.create(
        model="tiny-llama",
        messages=MESSAGES,
        stream=True,
        **{**LONG, **other},  # type: ignore[arg-type]
    )
    next(iter(stream))
    return stream  # type: ignore[return-value]


def test_a_plain_answer_and_a_stream_say_the_same(client: openai.OpenAI) -> None:
    asked = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 40, "temperature": 0.0}
    plain = client.chat.completions.create(**asked)
    assert plain.choices[0].message.role == "assistant"
    assert plain.choices[0].finish_reason in ("stop", "length")
    assert plain.usage is not None and plain.usage.completion_tokens > 0
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


def test_the_pages_own_path_and_costs(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 5})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/openai/chat/completions", body, headers)
    usage = json.loads(connection.getresponse().read())["usage"]
    connection.close()
    cost = (usage["prompt_tokens"] * 0.35 + usage["completion_tokens"] * 0.40) / 1e6
    assert usage["estimated_cost"] == pytest.approx(cost, rel=1e-9)


def test_sixteen_streams_at_once_are_each_what_they_are_alone(client: openai.OpenAI) -> None:

    def ask(number: int) -> str:
        stream = client.chat.completions.create(
            model="tiny-llama",
            messages=[{"role": "user", "content": f"{number} coaches"}],
            max_tokens=12,
            temperature=0.0,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    same = sum(a[:8] == b[:8] for a, b in zip(alone, together, strict=True))
    assert len(set(alone)) == 16, "the prompts must be told apart by their answers"
    assert same >= 12, "bfloat16 may round otherwise in a batch, but not from the first word"


def test_the_engine_s_own_times_reach_the_metrics(server: Server, client: openai.OpenAI) -> None:
    before = server.metric("enginehouse_request_queue_time_seconds_count")
    client.chat.completions.create(
        model="tiny-llama",
        messages=MESSAGES,
        max_tokens=9,  # type: ignore[arg-type]
    )
    assert server.metric("enginehouse_request_queue_time_seconds_count") == before + 1
    assert server.metric("enginehouse_inter_token_latency_seconds_count") >= 8

    def told() -> bool:
        """Of one worker's look at the engine."""
        text = server.get("/metrics")[1]
        found = re.findall(r"^enginehouse_iteration\w+_total ([0-9.e+-]+)$", text, re.MULTILINE)
        return len(found) == 3 and all(float(value) > 0 for value in found)

    wait_until(told, "the engine's statistics")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_sequences(server: Server, stream: bool) -> None:
    body = json.dumps({"model": "tiny-llama", "messages": MESSAGES, "stream": stream, **LONG})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"

    def num_cancelled() -> float:
        """In any phase: what runs may not have said a token yet."""
        name = "enginehouse_requests_cancelled_total"
        labels = [f'{{phase="{phase}",reason="client_gone"}}' for phase in PHASES]
        return sum(server.metric(f"{name}{each}") for each in labels)

    before = num_cancelled()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        if stream:
            assert connection.recv(10)
        else:
            wait_until(
                lambda: server.metric("enginehouse_num_requests_running") == 1, "it is running"
            )
    wait_until(lambda: server.metric("enginehouse_num_requests_running") == 0, "it was ended")
    wait_until(lambda: num_cancelled() == before + 1, "it was counted")


def test_errors_carry_the_field_at_fault(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny-llama",
            messages=MESSAGES,
            temperature=3,  # type: ignore[arg-type]
        )
    assert caught.value.param == "temperature"


def test_a_killed_host_fails_its_streams_clearly_and_comes_back(
    server: Server, client: openai.OpenAI
) -> None:
    stream = long_stream(client)
    pid = server.host_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    wait_until(lambda: server.get("/health/ready")[0] == 503, "readiness went false")
    assert server.get("/health/live")[0] == 200
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny-llama", messages=MESSAGES)  # type: ignore[arg-type]
    assert caught.value.status_code == 503
    wait_until(server.is_ready, "the host came back")
    assert server.host_pid() not in (None, pid)
    # Both workers: one of them may have answered all that was asked so far.
    wait_until(lambda: all(chat(server, 3).status_code == 200 for _ in range(4)), "it answers")


def test_a_host_that_stands_still_is_ended_and_its_streams_are_told(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_WATCHDOG_S", "5")
    server = Server(engine, tmp_path / "log")
    with server.client() as client:
        stream = long_stream(client)
        pid = server.host_pid()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(openai.APIError, match="engine host stopped"):
            for _ in stream:
                pass
    wait_until(server.is_ready, "another host is ready")
    assert server.host_pid() not in (None, pid)
    assert server.stop() == 0
    assert "the engine host stood still for 5 s and is ended" in (tmp_path / "log").read_text()


def test_more_than_the_queue_holds_is_refused_with_when_to_come_again(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 at once, eight run and four wait; none of the others is kept."""
    monkeypatch.setenv("ENGINEHOUSE_MAX_QUEUE_REQUESTS", "4")
    server = Server(engine, tmp_path / "log")
    url = f"{server.url}/v1/chat/completions"
    body = {"model": "tiny-llama", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 1500}

    def ask(_: int) -> tuple[int, str | None]:
        answer = client.post(url, json=body)
        return answer.status_code, answer.headers.get("retry-after")

    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    answered = sum(status == 200 for status, _ in found)
    refused = [after for status, after in found if status == 429]
    assert answered >= 12 and len(refused) == 40 - answered > 10
    assert all(after and 1 <= int(after) <= 300 for after in refused)
    wait_until(lambda: server.metric("enginehouse_num_requests_running") == 0, "all have ended")
    assert server.stop() == 0


def test_text_completions_of_several_prompts_have_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": "tiny-llama", "prompt": [[9, 8], [5, 6, 7]], "max_tokens": 6}
    answer = client.completions.create(**asked, temperature=0.0, logprobs=2, n=1)
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == 6
        for token, value, top in zip(
            logprobs.tokens or [], logprobs.token_logprobs, logprobs.top_logprobs or [], strict=True
        ):
            assert value == top[token] == max(top.values()), "greedy takes the likeliest"
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in client.completions.create(**asked, temperature=0.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [streamed[choice.index] for choice in answer.choices] == [
        choice.text for choice in answer.choices
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_followed_and_a_broken_one_is_the_sender_s_fault(
    client: openai.OpenAI, stream: bool
) -> None:
    def ask(**fields: object) -> str:
        answer = client.chat.completions.create(
            model="tiny-llama", messages=MESSAGES, seed=3, stream=stream, extra_body=fields
        )
        if not isinstance(answer, openai.Stream):
            return answer.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    assert ask(guided_choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("[ab]{3}-[0-9]", ask(guided_regex="[ab]{3}-[0-9]"))
    for fields in ({"guided_regex": "(a"}, {"guided_grammar": "root ::= missing"}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**fields)
        assert caught.value.param == next(iter(fields))


NO_HTTP: list[tuple[bytes, int, str]] = [
    (b"garbage\r\n\r\n", 400, "invalid_request_line"),
    (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "invalid_request_line"),
    (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_http_version"),
    (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400, "invalid_header"),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n", 431, "limit_request_headers"),
    (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 414, "limit_request_line"),
    (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400, "invalid_header"),
]


@pytest.mark.parametrize(("data", "status", "code"), NO_HTTP, ids=lambda item: str(item)[:24])
def test_what_is_no_http_is_refused_in_the_one_shape(
    server: Server, data: bytes, status: int, code: str
) -> None:
    answer = b""
    before = server.metric('enginehouse_requests_refused_total{reason="not_http"}')
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass  # it closed with bytes of ours unread
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert set(error) == {"message", "type", "param", "code"}
    assert server.metric('enginehouse_requests_refused_total{reason="not_http"}') == before + 1


def test_sigterm_waits_for_streams_and_not_for_idle_connections_and_takes_the_host_along(
    engine: Path, tmp_path: Path
) -> None:
    server = Server(engine, tmp_path / "log")
    host_pid = server.host_pid()
    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    idle.request("GET", "/health/live")
    idle.getresponse().read()
    with server.client() as client:
        asked = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 2000}
        chunks = iter(client.chat.completions.create(**asked, temperature=0.0, stream=True))
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert len(reasons) > 100 and reasons[-1] == "length", "the stream was not cut"
    assert server.process.wait(10) == 0
    idle.close()
    assert host_pid is not None and not psutil.pid_exists(host_pid)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_sighup_reads_the_keys_again_and_the_host_stays_until_gunicorn_ends(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice first concurrent=2\n")
    monkeypatch.setenv("ENGINEHOUSE_API_KEYS_FILE", str(keys))
    monkeypatch.setenv("ENGINEHOUSE_ACCESS_LOG", "1")
    server = Server(engine, tmp_path / "log", workers=2)
    pid = server.host_pid()

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 2}
        url = f"{server.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60).status_code

    assert (status("first"), status("second")) == (200, 401)
    keys.write_text("a line of many words\n")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: "all stays as it is" in (tmp_path / "log").read_text(), "it is said")
    assert (status("first"), status("second")) == (200, 401)
    keys.write_text("bob second\n")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: status("second") == 200 and status("first") == 401, "the new key opens")
    assert server.host_pid() == pid and server.stop() == 0
    assert pid is not None and not psutil.pid_exists(pid)
    log = (tmp_path / "log").read_text()
    assert "key alice" in log and "key bob" in log
    assert "first" not in log.replace("first model", "") and "second" not in log


def test_sighup_exchanges_the_engine_and_loses_no_request(engine: Path, tmp_path: Path) -> None:
    """A stream of the old engine goes on to its end, while new requests are the new one's."""
    current = tmp_path / "current"
    current.symlink_to(engine)
    other = build_endless_engine(tmp_path / "other", quant="int8")
    server = Server(current, tmp_path / "log")
    old_pid, old = server.host_pid(), fingerprint(server)
    statuses: list[int] = []
    with server.client() as client:
        stream = long_stream(client, max_tokens=2000)
        lead_to(current, other)
        os.kill(server.process.pid, signal.SIGHUP)

        def exchanged() -> bool:
            answer = chat(server, 2)
            statuses.append(answer.status_code)
            assert answer.status_code == 200, answer.text
            return bool(answer.json()["system_fingerprint"] != old)

        wait_until(exchanged, "the new engine answers")
        assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == "length"
    assert set(statuses) == {200} and len(statuses) > 1
    wait_until(lambda: not psutil.pid_exists(old_pid or 0), "the old host ended")
    lead_to(current, tmp_path)  # holds no engine
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: "all stays as it is" in (tmp_path / "log").read_text(), "it is said")
    wait_until(lambda: chat(server, 2).status_code == 200, "it answers")
    assert fingerprint(server) != old and server.stop() == 0


def lead_to(link: Path, engine: Path) -> None:
    beside = link.with_name("beside")
    beside.symlink_to(engine)
    beside.replace(link)


def chat(server: Server, max_tokens: int) -> httpx.Response:
    body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": max_tokens}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def fingerprint(server: Server) -> str:
    return str(chat(server, 1).json()["system_fingerprint"])


def test_a_worker_that_is_still_starting_is_ended_too(engine: Path, tmp_path: Path) -> None:
    """SIGTERM comes once, and to a worker that has no handler of its own yet."""
    server = Server(engine, tmp_path / "log")
    booted = "Booting worker with pid: "
    os.kill(int(server.log.read_text().partition(booted)[2].split()[0]), signal.SIGKILL)
    wait_until(lambda: server.log.read_text().count(booted) == 2, "another one starts")
    assert server.stop() == 0


def test_a_damaged_engine_ends_gunicorn_with_one_sentence(engine: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(engine, tmp_path / "damaged")
    with (damaged / "rank0.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(AssertionError) as caught:
        Server(damaged, tmp_path / "log")
    assert "rank0.safetensors: its SHA-256 is not the manifest's" in str(caught.value)


def test_a_master_that_is_killed_takes_everything_along(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_GRAMMARS_AT_ONCE", "1")
    server = Server(engine, tmp_path / "log")
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2, "a worker and the host, and perhaps already its grammar process"
    server.process.kill()
    server.process.wait(10)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_an_engine_that_cannot_be_served_ends_gunicorn_with_one_sentence(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        Server(tmp_path / "nothing", tmp_path / "log")
    assert "nothing is not a directory" in str(caught.value)
    assert time.monotonic() - started_s < DEADLINE_S
