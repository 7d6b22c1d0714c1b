"""Many JSON schemas over HTTP: each gives valid JSON or a 400, and no one else notices.

A tiny model of random weights answers, behind gunicorn and with its host and grammar compiler.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from makers.api_client import data_of
from makers.gunicorn_server import MESSAGES, Server
from makers.schemas import BAD, GOOD, ODD, as_text

ALL = {**GOOD, **ODD, **BAD}
STREAMED = {name: bool(number % 2) for number, name in enumerate(ALL)}
# Half of those that are answered, which takes its time; tests of grammars have them all.
SCHEMAS = {
    name: schema
    for number, (name, schema) in enumerate(ALL.items())
    if name in BAD or number % 4 < 2
}
# What the engine alone refuses, and the server says in other words first.
REWRITTEN = {
    *(
        "all_of_two",
        "ref_and_more",
        "typo",
        "fine_bound",
        "draft_07_tuple",
        "anchor_ref",
        "huge_count",
    ),
}
HEALTHY_TOKENS = 700
AT_ONCE = 6
LONGEST_SILENCE_S = 10.0  # between two tokens of the stream beside, on a machine that is shared


class Answer(NamedTuple):
    """texts and reasons: of each choice. error: of what is no 200, or came in mid-stream."""

    status: int
    texts: list[str]
    reasons: list[str]
    error: dict[str, Any] | None


def ask(port: int, schema: Any, stream: bool) -> Answer:
    """Eighty tokens of two answers. The schema's own text is sent: not all of it is JSON."""
    head = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 80, "n": 2, "seed": 5}
    inner = f'{{"name": "x", "strict": true, "schema": {as_text(schema)}}}'
    body = json.dumps({**head, "stream": stream})[:-1]
    body += f', "response_format": {{"type": "json_schema", "json_schema": {inner}}}}}'
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body.encode(), headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    if response.status != 200:
        return Answer(response.status, [], [], json.loads(data)["error"])
    texts, reasons = ["", ""], ["", ""]
    events = [event for event in data_of([data]) if event != "[DONE]"] if stream else []
    for event in events or [json.loads(data)]:
        if "error" in event:
            return Answer(200, texts, reasons, event["error"])
        for choice in event["choices"]:
            part = choice["delta"] if stream else choice["message"]
            texts[choice["index"]] += part.get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"] or ""
    return Answer(200, texts, reasons, None)


class Healthy(threading.Thread):
    """Streams one greedy answer after the other until it is told to end."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.longest_silence_s = 0.0
        self.ending = threading.Event()
        self._server = server

    def run(self) -> None:
        with self._server.client() as client:
            while not self.ending.is_set():
                self.texts.append(self._one(client))

    def _one(self, client: Any) -> str:
        text, last_s = "", time.monotonic()
        for chunk in client.chat.completions.create(
            model="tiny-llama",
            messages=MESSAGES,
            max_tokens=HEALTHY_TOKENS,
            temperature=0.0,
            stream=True,
        ):
            now_s = time.monotonic()
            self.longest_silence_s = max(self.longest_silence_s, now_s - last_s)
            last_s = now_s
            text += chunk.choices[0].delta.content or ""
        assert chunk.choices[0].finish_reason == "length"
        return text


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Deterministic, so that the stream beside must say to the letter what it says alone."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ENGINEHOUSE_DETERMINISTIC", "1")
        running = Server(engine, tmp_path_factory.mktemp("gunicorn") / "log")
    yield running
    assert running.stop() == 0


def verdict(schema: Any, answer: Answer) -> str:
    """valid, cut or refused; AssertionError for all else."""
    if answer.error is not None:
        assert answer.status == 400, answer
        assert answer.error["type"] == "invalid_request_error", answer
        assert answer.error["param"] or answer.error["code"] == "invalid_json", answer
        return "refused"
    older = isinstance(schema, dict) and isinstance(schema.get("items"), list)
    validator = (Draft7Validator if older else Draft202012Validator)(schema)
    finished = [
        text for text, reason in zip(answer.texts, answer.reasons, strict=True) if reason == "stop"
    ]
    for text in finished:
        validator.validate(json.loads(text))
    assert set(answer.reasons) <= {"stop", "length"}, answer
    return "valid" if finished else "cut"


def test_each_of_many_schemas_gives_valid_json_or_a_400(server: Server) -> None:
    assert len(SCHEMAS) >= 100
    healthy = Healthy(server)
    healthy.start()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = {
                name: pool.submit(ask, server.port, schema, STREAMED[name])
                for name, schema in SCHEMAS.items()
            }
            answers = {name: future.result() for name, future in asked.items()}
    finally:
        healthy.ending.set()
        healthy.join()
    verdicts, wrong = {}, {}
    for name, answer in answers.items():
        try:
            verdicts[name] = verdict(SCHEMAS[name], answer)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:300]}"
    counts = Counter(verdicts.values())
    print(f"\n{len(SCHEMAS)} schemas: {dict(counts)}; cut: {of(verdicts, 'cut')}")
    print(f"beside: {len(healthy.texts)} streams, {healthy.longest_silence_s:.2f} s of silence")
    assert wrong == {}
    refused = {name for name in BAD if verdicts[name] == "refused"}
    assert refused == BAD.keys() - REWRITTEN
    assert [name for name in GOOD.keys() & verdicts.keys() if verdicts[name] != "valid"] == []
    assert healthy.texts[1:] and len(set(healthy.texts)) == 1
    assert healthy.longest_silence_s < LONGEST_SILENCE_S


def of(verdicts: dict[str, str], wanted: str) -> list[str]:
    return [name for name, verdict in verdicts.items() if verdict == wanted]
