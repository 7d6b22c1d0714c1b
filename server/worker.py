"""gunicorn's gevent worker, taught to drain: it ends when its requests do, not its connections.

A kept-alive connection that carries no request would hold SIGTERM up for as long as the client
keeps it open. Knows no route and no engine.
"""

from __future__ import annotations

import socket
from types import FrameType
from typing import Any

import gevent
from flask import Flask
from gunicorn.workers.ggevent import GeventWorker

from enginehouse.server.app import start_draining


class Worker(GeventWorker):
    """Counts which connections carry a request; lets go of the others once it drains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: set[socket.socket] = set()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        self._idle.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self._idle.discard(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        self._idle.discard(sock)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            if self.alive:
                self._idle.add(sock)
            else:
                _end(sock)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self._drain)  # not inside a signal handler

    def _drain(self) -> None:
        assert isinstance(self.wsgi, Flask), "gunicorn is given create_app() itself"
        start_draining(self.wsgi)
        for connection in list(self._idle):
            _end(connection)


def _end(connection: socket.socket) -> None:
    """Let the next read find the end of the connection; what is being written still goes out."""
    try:
        connection.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # it is closed already
