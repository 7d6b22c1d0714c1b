"""Three hundred bad bodies, each answered rightly, while a healthy stream beside them goes on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from typing import Any

import gevent
import pytest
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer

from doubles.scripted_client import ScriptedClient, ScriptedGeneration
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.bad_bodies import BAD_BODIES, MAX_BODY_BYTES, BadBody, with_fields
from makers.text_engine import engine_info
from makers.token_outputs import STOP, TOKENIZER, output

PATH = "/v1/chat/completions"
TICK_S = 0.005
[LETTER] = TOKENIZER.encode("a").ids


class Ticking(ScriptedGeneration):
    """A letter every 5 ms until it is told to end."""

    ending = False

    def get(self, timeout_s: float | None = None) -> Any:
        gevent.sleep(TICK_S)
        if self.finished:
            return None
        if self.ending:
            self._open.clear()
            return 0, output([], STOP)
        return 0, output([LETTER])


class TickingClient(ScriptedClient):
    def submit(self, *args: Any, **more: Any) -> ScriptedGeneration:
        super().submit(*args, **more)
        self.generations[-1] = Ticking([])
        return self.generations[-1]


def post(address: tuple[str, int], bad: BadBody) -> tuple[int, Any]:
    """The status and the JSON of the answer, which may come before the body has gone out."""
    body = bad.make()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    if bad.content_type:
        head += f"Content-Type: {bad.content_type}\r\n"
    with gsocket.create_connection(address) as client:
        client.settimeout(60)
        try:
            client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode())
            for start in range(0, len(body), 1 << 16):
                client.sendall(body[start : start + (1 << 16)])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was refused by its length alone
        data = b""
        try:
            while part := client.recv(1 << 16):
                data += part
        except ConnectionResetError:
            pass
    header, _, text = data.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in header, (bad.name, data[:300])
    return int(header.split()[1]), json.loads(text)


def read_stream(address: tuple[str, int], moments: list[float]) -> str:
    """The whole healthy stream; the moment of each piece is noted."""
    body = with_fields(stream=True)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    data = b""
    with gsocket.create_connection(address) as client:
        client.sendall(head.encode() + body)
        while part := client.recv(1 << 16):
            data += part
            moments.append(time.monotonic())
    return data.decode()


def test_there_are_three_hundred_different_ones() -> None:
    names = Counter(bad.name for bad in BAD_BODIES)
    assert len(names) == len(BAD_BODIES) >= 300
    assert {bad.status for bad in BAD_BODIES} == {400, 404, 413, 415}


@pytest.fixture
def beside(settings: ServerSettings) -> Any:
    larger = dataclasses.replace(settings, max_body_bytes=MAX_BODY_BYTES)
    client = TickingClient(engine_info())
    server = WSGIServer(("127.0.0.1", 0), create_app(larger, client), log=None)
    server.start()
    yield server.address, client
    server.stop(timeout=1)


def test_each_is_refused_rightly_while_a_healthy_stream_goes_on(beside: Any) -> None:
    address, client = beside
    moments: list[float] = []
    stream = gevent.spawn(read_stream, address, moments)
    with gevent.Timeout(5):
        while not client.generations:
            gevent.sleep(0.01)
    wrong = []
    for bad in BAD_BODIES:
        num_before = len(moments)
        status, answer = post(address, bad)
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}, bad.name
        if status != bad.status or (bad.param is not None and error["param"] != bad.param):
            wrong.append((bad.name, status, error))
        assert len(error["message"]) < 1000, bad.name
        with gevent.Timeout(5, AssertionError(f"the stream stood still after {bad.name}")):
            while len(moments) == num_before:
                gevent.sleep(0.001)
    assert wrong == []
    assert len(client.generations) == 1, "a bad body reached the engine"
    client.generations[0].ending = True
    text = stream.get(timeout=60)
    assert "data: [DONE]" in text and '"finish_reason":"stop"' in text
    assert '"error"' not in text
