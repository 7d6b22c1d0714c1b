"""gunicorn's gevent worker, taught to drain: it ends when its requests do, not its connections.

A kept-alive connection that carries no request would hold SIGTERM up for as long as the client
keeps it open. Knows no route and no engine.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import uuid
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

import gevent
import msgspec
from flask import Flask
from gunicorn.workers.ggevent import GeventWorker

from enginehouse.runtime.host.listening import file_of
from enginehouse.server.api.batches.routes import run_batches
from enginehouse.server.app import (
    close_tracing,
    count_not_http,
    engine_client,
    start_draining,
)
from enginehouse.server.launch import held_signals
from enginehouse.server.launch.gunicorn_hooks import HOST_ADDRESS, REPLICAS_FILE
from enginehouse.server.wire.error_body import make_error

_LOG = logging.getLogger("enginehouse.server")
_MEETS_S, _POLL_S = 5.0, 0.01
_FIRST_REQUEST_S = 2.0  # of who has just connected to a worker that drains
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class Worker(GeventWorker):
    """Counts which connections carry a request; lets go of the others once it drains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._new: set[socket.socket] = set()  # whose first request has not come
        self._idle: set[socket.socket] = set()

    def run(self) -> None:
        """Where a host listens already, no request is taken before this worker has met it."""
        held_signals.release()
        gevent.get_hub().print_exception = _log_exception  # type: ignore[assignment,method-assign]
        named = os.environ.get(REPLICAS_FILE)
        file = Path(named) if named else file_of(os.environ[HOST_ADDRESS])
        if file is not None and file.exists():
            client = engine_client(cast(Flask, self.wsgi))
            with suppress(gevent.Timeout), gevent.Timeout(_MEETS_S):
                while self.alive and not client.ready:
                    gevent.sleep(_POLL_S)
        gevent.spawn(run_batches, cast(Flask, self.wsgi))
        gc.collect()
        gc.freeze()  # what is loaded by now stays: no collection looks at it again
        try:
            super().run()
        finally:
            gc.unfreeze()  # else its end comes too late for them, in another order
            close_tracing(cast(Flask, self.wsgi))

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        self._new.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self._new.discard(client)
            self._idle.discard(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        self._new.discard(sock)
        self._idle.discard(sock)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            if self.alive:
                self._idle.add(sock)
            else:
                _end(sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """What is no HTTP is refused in the one shape of every error, not in gunicorn's HTML.

        gunicorn logs it, chooses the status and writes it: here its writing is taken down.
        """
        taken = _Taken(client)
        super().handle_error(req, cast(socket.socket, taken), addr, exc)
        status_line, _, _ = taken.data.partition(b"\r\n")
        if status_line:
            if b" 500 " not in status_line:
                count_not_http(cast(Flask, self.wsgi))
            try:
                client.sendall(_error_bytes(status_line, exc))
            except OSError:
                self.log.debug("Failed to send an error: the client has gone")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self._drain)  # not inside a signal handler

    def _drain(self) -> None:
        assert isinstance(self.wsgi, Flask), "gunicorn is given create_app() itself"
        start_draining(self.wsgi)
        for connection in list(self._idle):
            _end(connection)
        gevent.sleep(_FIRST_REQUEST_S)
        for connection in [*self._new, *self._idle]:
            _end(connection)


def _log_exception(context: object, *what: Any) -> None:
    """gevent's hub would print what a greenlet ends by."""
    _LOG.error("a greenlet failed: %r", context, exc_info=what)


def _end(connection: socket.socket) -> None:
    """Let the next read find the end of the connection; what is being written still goes out.

    Not by gevent's own shutdown, which has who waits for a read fail: gunicorn would log that.
    """
    try:
        connection._sock.shutdown(socket.SHUT_RD)  # type: ignore[attr-defined]
    except OSError:
        pass  # it is closed already


class _Taken:
    """A socket that keeps what is sent, for another to send."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.data = b""

    def sendall(self, data: bytes) -> None:
        self.data += data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _error_bytes(status_line: bytes, exc: BaseException) -> bytes:
    """status_line: `HTTP/1.1 400 Bad Request`."""
    status = int(status_line.split()[1])
    message, code = "the server failed on this request; its log has more", None
    if status != 500:
        message = f"the request is not HTTP that this server reads: {str(exc)[:200]}"
        code = _WORDS.sub("_", type(exc).__name__).lower()
    body = msgspec.json.encode(make_error(status, message, code=code).body)
    head = (
        "Connection: close\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: {uuid.uuid4().hex}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return status_line + b"\r\n" + head.encode() + body
