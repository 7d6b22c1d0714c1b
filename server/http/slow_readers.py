"""Clients that read nothing: bytes that one does not take for too long end its connection.

gunicorn sends what an answer yields before it asks for more, and waits for as long as the client
takes nothing: so the time between the two is the sending's. This file does not know what is sent.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator

import gevent

LOG = logging.getLogger("enginehouse.server")

_PIECE_BYTES = 64 * 1024  # taken within the limit, however slowly, a large answer goes on
_UNSENT_BYTES = 128 * 1024  # that the kernel keeps for a client; its own 4 MiB would hide one
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what nobody reads


class SlowReaders:
    """Of one worker. limit_s: how long sending may stand still. on_cut: told of each that is cut.

    Its greenlet runs as long as any answer is being sent.
    """

    def __init__(self, limit_s: float, on_cut: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._on_cut = on_cut
        self._open: set[_Answer] = set()
        self._looks = False  # whether its greenlet runs

    def watch(
        self, chunks: Iterable[bytes], sock: socket.socket, request_id: str
    ) -> Iterator[bytes]:
        """The same bytes, in pieces; the connection is cut while one of them is not taken."""
        return _Answer(self, chunks, sock, request_id)

    def begin(self, answer: _Answer) -> None:
        try:
            answer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)
        except OSError:
            pass  # its client has gone already
        self._open.add(answer)
        if not self._looks:
            self._looks = True
            gevent.spawn(self._look)

    def end(self, answer: _Answer) -> None:
        self._open.discard(answer)

    def _look(self) -> None:
        while self._open:
            gevent.sleep(min(1.0, self._limit_s / 4))
            for answer in list(self._open):
                if answer.stands_still_s > self._limit_s:
                    self._cut(answer)
        self._looks = False

    def _cut(self, answer: _Answer) -> None:
        """The write that waits fails, and the answer ends as when a client has gone."""
        self.end(answer)
        self._on_cut()
        said = "request %s: its client took nothing for %g s and is cut"
        LOG.warning(said, answer.request_id, self._limit_s)
        try:
            answer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            answer.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone in this moment


class _Answer:
    """The bytes of one answer, until they are sent: its end's mark is, before it is closed."""

    def __init__(
        self, readers: SlowReaders, chunks: Iterable[bytes], sock: socket.socket, request_id: str
    ) -> None:
        self.sock, self.request_id = sock, request_id
        self._readers = readers
        self._chunks = chunks
        self._pieces: Iterator[bytes] | None = None
        self._sending_s: float | None = None

    @property
    def stands_still_s(self) -> float:
        """Seconds since a piece was handed over that is not sent; 0 while none is."""
        return 0.0 if self._sending_s is None else time.monotonic() - self._sending_s

    def __iter__(self) -> _Answer:
        return self

    def __next__(self) -> bytes:
        if self._pieces is None:
            self._pieces = _pieces(self._chunks)
            self._readers.begin(self)
        self._sending_s = None
        try:
            return next(self._pieces)
        finally:
            self._sending_s = time.monotonic()

    def close(self) -> None:
        self._readers.end(self)
        if close := getattr(self._chunks, "close", None):
            close()


def _pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            yield chunk[start : start + _PIECE_BYTES]
