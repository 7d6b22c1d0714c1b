"""Each request that is turned away, and each answer that is left, is counted by why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gevent
import pytest
from flask.testing import FlaskClient
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer
from prometheus_client.parser import text_string_to_metric_families

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.request import Refusal
from enginehouse.server.api_keys import KeyLimits, make_key
from enginehouse.server.app import create_app
from enginehouse.server.observe.reasons import NOT_HTTP, REFUSALS
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS, ask
from makers.api_fixtures import SocketHandler
from makers.token_outputs import tokens

FULL = Refusal("the queue is full", code="queue_full", status=429)
LATE = Refusal("not begun", code="queue_timeout", status=503)


def counted(http: FlaskClient, name: str) -> dict[tuple[str, ...], float]:
    """The samples that are not 0, by the values of their labels in the order of the names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == f"enginehouse_requests_{name}_total" and sample.value
    }


Ask = Callable[[FlaskClient, ScriptedClient], Any]
KEY = {"Authorization": "Bearer sk-quick"}
REFUSED: dict[str, Ask] = {
    "queue_full": lambda http, engine: (setattr(engine, "no_room", FULL), ask(http)),
    "queue_timeout": lambda http, engine: (setattr(engine, "script", [LATE.error()]), ask(http)),
    "engine_unavailable": lambda http, engine: (setattr(engine, "ready", False), ask(http)),
    "model_not_found": lambda http, _: ask(http, model="another"),
    "context_length": lambda http, _: ask(
        http, messages=[{"role": "user", "content": "the dog " * 500}]
    ),
    "not_served": lambda http, _: http.get("/v1/" + "made-up"),
    "body_too_large": lambda http, _: ask(http, user="x" * 100_001),
    "media_type": lambda http, _: http.post(PATHS[0], data="{}", content_type="text/plain"),
    "invalid": lambda http, _: ask(http, temperature=9),
}
OTHERS = {"unauthorized", "rate_limit", "body_timeout", NOT_HTTP}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_is_counted_by_its_reason(
    http: FlaskClient, engine: ScriptedClient, reason: str
) -> None:
    assert counted(http, "refused") == {}
    REFUSED[reason](http, engine)
    assert counted(http, "refused") == {(reason,): 1}


def test_a_reason_of_each_kind_is_told_from_the_start(http: FlaskClient) -> None:
    assert set(REFUSED) | OTHERS == set(REFUSALS)
    text = http.get("/metrics").text
    assert all(f'enginehouse_requests_refused_total{{reason="{r}"}} 0.0' in text for r in REFUSALS)


def test_keys_that_are_unknown_or_used_up_are_counted_and_probes_are_not(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    key = make_key("sk-quick", KeyLimits(rpm=1))
    http = create_app(replace(settings, api_keys=(key,)), engine).test_client()
    for headers in (KEY, KEY, {"Authorization": "Bearer sk-made-up"}, {}):
        http.post(PATHS[0], json=HELLO, headers=headers)
    engine.ready = False
    assert http.get("/health/ready").status_code == 503
    assert counted(http, "refused") == {("rate_limit",): 1, ("unauthorized",): 2}


def test_what_is_refused_in_mid_stream_is_counted_too(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    engine.script = [None, LATE.error()]
    with ask(http, stream=True) as response:
        assert response.status_code == 200 and b"queue_timeout" in response.data
    assert counted(http, "refused") == {("queue_timeout",): 1}
    assert counted(http, "cancelled") == {}
    line = 'enginehouse_request_errors_total{code="queue_timeout",status="503"} 1.0'
    assert line in http.get("/metrics").text.splitlines()


def hang_up(address: tuple[str, int], engine: ScriptedClient, stream: bool) -> None:
    """Ask, and leave once the engine has the request."""
    body = json.dumps({**HELLO, "stream": stream})
    head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with gsocket.create_connection(address) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        with gevent.Timeout(60):
            while not engine.generations:
                gevent.idle()
            if stream and engine.script:
                client.recv(10)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_client_that_leaves_is_counted_by_how_far_its_answer_was(
    settings: ServerSettings, engine: ScriptedClient, phase: str, stream: bool
) -> None:
    app = create_app(settings, engine)
    server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
    server.start()
    engine.begun = phase != "queue"
    engine.script = tokens("a") if phase == "decode" else []
    hang_up(server.address, engine, stream)
    with gevent.Timeout(60):
        while not counted(app.test_client(), "cancelled"):
            gevent.sleep(0.01)
    server.stop()
    assert counted(app.test_client(), "cancelled") == {(phase, "client_gone"): 1}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_what_a_shutdown_ends_is_counted_as_that(
    settings: ServerSettings, engine: ScriptedClient, stream: bool
) -> None:
    """gunicorn kills the greenlets of requests that outlive graceful_timeout."""
    app = create_app(settings, engine)
    engine.script = tokens("a")
    http = app.test_client()

    def read() -> None:
        with ask(http, stream=stream, n=1) as response:
            assert response.data

    asking = gevent.spawn(read)
    with gevent.Timeout(60):
        while not engine.generations:
            gevent.idle()
    asking.kill()
    assert counted(app.test_client(), "cancelled") == {("decode", "shutdown"): 1}
    assert engine.generations[0].finished
