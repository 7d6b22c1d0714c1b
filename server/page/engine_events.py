"""`GET /v1/engine/events`: the engine as it runs, by server-sent events, for as long as one looks.

What is told is the engine host's own figures, which every worker has once a second anyway, and the
sequences of the worker that tells. Knows no text of a request.
"""

from __future__ import annotations

import dataclasses
import socket
import ssl
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import gevent
import msgspec
from flask import Flask, Response, request
from gevent.select import select

from enginehouse.runtime.errors import RequestError
from enginehouse.server.http import sse
from enginehouse.server.http.service import Service
from enginehouse.server.page.manifest import manifest_facts

PATH = "/v1/engine/events"
_PERIOD_S = 0.5
_MAX_WATCHERS = 16  # of a worker
_MAX_LANES = 256  # that are told one by one
_encode = msgspec.json.Encoder().encode


def add_engine_events(app: Flask, service: Service) -> None:
    manifest = manifest_facts(service.settings.engine_dir)

    @app.get(PATH)
    def engine_events() -> Response:
        if service.lanes.num_watchers >= _MAX_WATCHERS:
            raise RequestError(
                f"{_MAX_WATCHERS} look at this worker already; wanted fewer, or /metrics",
                code="too_many_watchers",
                status=429,
            )
        sock = request.environ.get("gunicorn.socket")
        return Response(_events(service, manifest, sock), headers=sse.HEADERS)


def _events(
    service: Service, manifest: dict[str, Any] | None, sock: socket.socket | None
) -> Iterator[bytes]:
    """sock None: nobody can tell how long one looks, and there is one event."""
    lanes, told, told_s = service.lanes, b"", 0.0
    told_info, ended = None, lanes.num_ended
    lanes.num_watchers += 1
    try:
        while True:
            look = _look(service, ended)
            ended = lanes.num_ended
            info = service.info
            if info is not None and info is not told_info:
                told_info = info
                look["engine"] = {"info": dataclasses.asdict(info), "manifest": manifest}
            now_s = time.monotonic()
            if (data := _encode(look)) != told:
                told, told_s = data, now_s
                yield b"data: " + data + b"\n\n"
            elif now_s - told_s > service.settings.keepalive_s:
                told_s = now_s
                yield b": \n\n"
            if sock is None or _is_left(sock) or service.draining:
                return
    finally:
        lanes.num_watchers -= 1


def _look(service: Service, ended: int) -> dict[str, Any]:
    client, lanes = service.client, service.lanes
    every = lanes.open()
    stats = dataclasses.asdict(client.stats)
    blocks = stats.pop("kv_blocks")
    del stats["preempted"]
    shown = [lane._asdict() for lane in islice(every, _MAX_LANES)]
    return {
        "object": "engine.look",
        "ready": client.ready,
        "stands_still": client.stands_still,
        "stats": stats,
        "kv_blocks": blocks and "".join(map(str, blocks)),
        "lanes": shown,
        "num_more_lanes": sum(1 for _ in every),
        "ended": [lane._asdict() for lane in lanes.ended_after(ended)],
        "engine": None,
    }


def _is_left(sock: socket.socket) -> bool:
    """After a while, or at once when the client has closed."""
    if isinstance(sock, ssl.SSLSocket):  # TLS has no peek: the next write will tell
        gevent.sleep(_PERIOD_S)
        return False
    readable, _, _ = select([sock], [], [], _PERIOD_S)
    if not readable:
        return False
    try:
        if sock.recv(1, socket.MSG_PEEK) == b"":
            return True
    except ConnectionError:
        return True
    gevent.sleep(_PERIOD_S)  # its next request came already
    return False
