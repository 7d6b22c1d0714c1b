"""`/v1/engine/events`: what is told of the engine, to whom, and until when."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import gevent
import pytest
from flask.testing import FlaskClient
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import read_keys
from enginehouse.server.app import create_app
from enginehouse.server.page.manifest import manifest_facts
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire.answers import EngineLook
from makers.api_client import HELLO, error_of
from makers.api_fixtures import SocketHandler

PATH = "/v1/engine/events"


def look_of(data: bytes) -> dict[str, Any]:
    assert data.startswith(b"data: ") and data.endswith(b"\n\n")
    look: dict[str, Any] = json.loads(data[6:])
    EngineLook.model_validate(look)
    return look


def test_a_look_has_the_host_s_figures_and_the_engine(http: FlaskClient) -> None:
    response = http.get(PATH)
    assert response.mimetype == "text/event-stream"
    look = look_of(response.data)
    assert look["ready"] and look["stats"]["num_kv_blocks"] == 10
    assert look["engine"]["info"]["max_batch_size"] == 4
    assert look["lanes"] == [] == look["ended"]
    assert look["kv_blocks"] is None and "preempted" not in look["stats"]


def test_blocks_are_told_by_a_digit_each(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.stats = dataclasses.replace(engine.stats, kv_blocks=bytes([3, 2, 0, 1]))
    assert look_of(http.get(PATH).data)["kv_blocks"] == "3201"


def test_keys_apply(settings: ServerSettings, engine: ScriptedClient) -> None:
    keys = dataclasses.replace(settings, api_keys=(make_key(),))
    http = create_app(keys, engine).test_client()
    assert error_of(http.get(PATH))["code"] == "invalid_api_key"
    response = http.get(PATH, headers={"Authorization": "Bearer sesame"})
    assert response.status_code == 200


def make_key() -> Any:
    [key] = read_keys({"ENGINEHOUSE_API_KEYS": "sesame"})
    return key


class Watcher:
    """A connection to a real server that looks, and reads look after look."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = gsocket.create_connection(address)
        self.sock.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.text = b""

    def until(self, wanted: bytes) -> bytes:
        with gevent.Timeout(15):
            while wanted not in self.text:
                self.text += self.sock.recv(65536)
        return self.text


def test_one_who_looks_sees_an_answer_run_and_end(
    address: tuple[str, int], engine: ScriptedClient
) -> None:
    engine.script = engine.script[:1]  # and then silence
    watcher = Watcher(address)
    watcher.until(b'"lanes":[]')
    body = json.dumps({**HELLO, "stream": True}).encode()
    asker = gsocket.create_connection(address)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    asker.sendall(head.encode() + body)
    text = watcher.until(b'"state":"decode"')
    assert b'"request_id":"mine"' in text
    asker.close()
    assert b'"state":"cancelled"' in watcher.until(b'"state":"cancelled"')
    watcher.sock.close()


def test_a_worker_that_drains_and_a_client_that_leaves_end_it(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    app = create_app(settings, engine)
    service = app.extensions["enginehouse"]
    server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
    server.start()
    leaves, stays = Watcher(server.address), Watcher(server.address)
    for each in (leaves, stays):
        each.until(b"engine.look")
    assert service.lanes.num_watchers == 2
    leaves.sock.close()
    with gevent.Timeout(15):
        while service.lanes.num_watchers > 1:
            gevent.sleep(0.01)
        service.draining = True
        while service.lanes.num_watchers:
            gevent.sleep(0.01)
    stays.sock.close()
    server.stop(timeout=1)


def test_more_than_a_few_may_not_look(http: FlaskClient) -> None:
    http.application.extensions["enginehouse"].lanes.num_watchers = 16
    response = http.get(PATH)
    assert (response.status_code, error_of(response)["code"]) == (429, "too_many_watchers")


def test_of_a_manifest_no_path_and_no_text_is_told(tmp_path: Any) -> None:
    assert manifest_facts(tmp_path) is None
    manifest = {
        "name": "tiny",
        "source": {"path": "/home/somebody"},
        "choices": {"quant": "fp8", "tokenizer": "/home/somebody", "gpu": None},
        "verify": {"mean_kl": 0.1, "prompt": "a secret", "answer": "b"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    facts = manifest_facts(tmp_path)
    assert facts is not None and facts["choices"] == {"quant": "fp8"}
    assert facts["verify"] == {"mean_kl": 0.1}
    assert "somebody" not in json.dumps(facts) and "secret" not in json.dumps(facts)


@pytest.mark.parametrize("page", [True, False])
def test_it_is_there_without_the_page(
    settings: ServerSettings, engine: ScriptedClient, page: bool
) -> None:
    http = create_app(dataclasses.replace(settings, page=page), engine).test_client()
    assert http.get(PATH).status_code == 200
