"""A client that reads nothing is cut; one that is slow, or waits for a slow engine, is not."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import gevent
import pytest
from gevent import socket as gsocket
from gevent.pywsgi import WSGIServer

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.http.slow_readers import SlowReaders
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS
from makers.api_fixtures import SocketHandler
from makers.token_outputs import tokens

DEADLINE_S = 60
BODY = json.dumps({**HELLO, "stream": True}).encode()
REQUEST = (
    f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"X-Request-Id: slow-1\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY


@contextmanager
def asked(settings: ServerSettings, engine: ScriptedClient) -> Iterator[tuple[int, socket.socket]]:
    """A server, and a connection that has asked for a stream and can hold little of it."""
    app = create_app(settings, engine)
    server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
    server.start()
    client = gsocket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(DEADLINE_S)
    with client:
        client.connect(server.address)
        client.sendall(REQUEST)
        yield server.server_port, client
    server.stop(timeout=1)


def num_cut(port: int) -> str:
    with gsocket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    [line] = [line for line in text.splitlines() if line.startswith("enginehouse_slow_readers_tot")]
    return line.split()[1]


def test_a_client_that_reads_nothing_is_cut_and_its_sequence_cancelled(
    settings: ServerSettings, engine: ScriptedClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "enginehouse.server")
    engine.script = tokens("the lazy dog " * 10_000)  # and no end
    with asked(dataclasses.replace(settings, send_timeout_s=0.5), engine) as (port, client):
        with gevent.Timeout(DEADLINE_S):
            while not engine.generations:
                gevent.idle()
            assert engine.generations[0].ended.wait(DEADLINE_S)
        assert engine.generations[0].cancels == [None]
        seen = b""
        with suppress(ConnectionResetError):
            while piece := client.recv(65536):
                seen += piece
        assert b"[DONE]" not in seen and not seen.endswith(b"0\r\n\r\n")
        assert num_cut(port) == "1.0"
    assert "request slow-1: its client took nothing for 0.5 s and is cut" in caplog.text


def test_an_engine_that_is_silent_is_not_its_client_s_fault(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    engine.script = tokens("the")  # and nothing more
    short = dataclasses.replace(settings, send_timeout_s=0.05, keepalive_s=0.2)
    with asked(short, engine) as (port, client):
        seen = b""
        while seen.count(b": keep-alive") < 3:  # each after four times the limit
            piece = client.recv(65536)
            assert piece, "it was cut"
            seen += piece
        assert num_cut(port) == "0.0"


def test_a_large_answer_is_handed_over_in_pieces_that_are_its_bytes() -> None:
    """Each has the whole limit: a client that takes 64 KiB in that time is slow, and goes on."""
    chunks = [b"a" * 200_000, b"", b"b"]
    one, other = socket.socketpair()
    with one, other:
        pieces = list(SlowReaders(60, lambda: None).watch(chunks, one, "id"))
    assert b"".join(pieces) == b"".join(chunks)
    assert max(map(len, pieces)) == 65536


def test_one_greenlet_looks_however_many_answers_begin_and_end() -> None:
    readers = SlowReaders(60.0, lambda: None)
    looks, spawned = gevent.spawn, []
    sockets = socket.socketpair()
    with pytest.MonkeyPatch.context() as patch, sockets[0], sockets[1]:
        patch.setattr(gevent, "spawn", lambda *args: spawned.append(looks(*args)) or spawned[-1])
        for _ in range(20):
            answer = readers.watch([b"x"], sockets[0], "slow-1")
            assert next(answer) == b"x"
            gevent.sleep(0)
            answer.close()  # type: ignore[attr-defined]
    assert len(spawned) == 1
    gevent.killall(spawned)
