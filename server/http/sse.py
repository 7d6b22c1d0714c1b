"""A completion as server-sent events, in its form's framing, and the watch for a client that left.

WSGI tells of a closed connection only at the next write, and a plain request writes once, at its
end: so a greenlet looks at the socket itself, and a client that has gone becomes a cancel.
This file does not know Flask, the schema or the engine.
Source: WHATWG HTML, "Server-sent events"; the product page's stream.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TypeVar

import gevent
from gevent.socket import wait_read

from enginehouse.runtime.errors import HostUnavailable, RequestError
from enginehouse.server.answer.completion import ClientGone, Completion, Delta, Generation
from enginehouse.server.prompt.chat import call_beside_the_loop
from enginehouse.server.wire.error_body import ErrorAnswer, error_answer

LOG = logging.getLogger("enginehouse.server")
T = TypeVar("T")

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

_POLL_S = 0.25
_MOST_AT_ONCE = 1 << 14  # bytes
_OPEN_STATES = (1, 2, 3)  # Linux, tcp_states.h: ESTABLISHED, SYN_SENT, SYN_RECV


class Stream:
    """A completion that has begun: its first output, or a first silence, has been seen.

    So whatever the engine refuses at once still gets a status line of its own.
    """

    def __init__(
        self, completion: Completion, generation: Generation | None, keepalive_s: float
    ) -> None:
        """Waits. Raises what Completion.run raises."""
        self.completion, self.generation = completion, generation
        self.failure: ErrorAnswer | None = None  # what was told in mid-stream
        self._deltas = completion.run(generation, keepalive_s)
        self._first = next(self._deltas)

    def deltas(self) -> Generator[Delta | None, None, None]:
        with closing(self._deltas):
            yield self._first
            yield from self._deltas

    @property
    def has_more(self) -> bool:
        """Whether the next delta, or the end, is there without waiting."""
        return self.completion.finished or (
            self.generation is not None and self.generation.has_output
        )

    def close(self) -> bool:
        """Cancel what still runs; whether anything did."""
        self._deltas.close()
        early = not self.completion.finished
        if early and self.generation is not None:  # it may never have been begun
            self.generation.cancel()
        return early


def events(stream: Stream, request_id: str) -> Generator[bytes, None, None]:
    """The whole stream. An error after its beginning is told in it, and ends it.

    What is there at once is one piece, and so one write: the role and the first token, several
    choices of a step, and the steps that came while others were served.
    """
    completion = stream.completion
    framing = completion.framing
    data = framing.events(completion.opening())
    try:
        with closing(stream.deltas()) as deltas:
            for delta in deltas:
                if delta is None:
                    yield data + framing.silence
                    data = b""
                    continue
                data += told(completion, partial(_events, completion, delta))
                if data and (len(data) > _MOST_AT_ONCE or not stream.has_more):
                    ready, data = data, b""
                    yield ready
        yield data + framing.events(completion.closing()) + framing.end
    except ClientGone:
        return
    except Exception as error:  # the status line is sent: a handler further out could not answer
        if not isinstance(error, (HostUnavailable, RequestError)):
            fields = {"request_id": request_id}
            LOG.exception("request %s failed in mid-stream", request_id, extra=fields)
        stream.failure = error_answer(error, request_id)
        yield data + framing.events(completion.failing(stream.failure.body)) + framing.end
    finally:
        stream.close()


def told(completion: Completion, work: Callable[[], T]) -> T:
    """What an answer is as it is sent. A large one takes long to be told, and is told beside the
    event loop.
    """
    return call_beside_the_loop(work) if completion.is_large else work()


def _events(completion: Completion, delta: Delta) -> bytes:
    text = completion.told_at_once(delta)
    return completion.framing.events(completion.told(delta)) if text is None else text


class DisconnectWatch:
    """Cancels the generation when the client closes its connection; ends with the request.

    sock None (no gunicorn, as in tests): nothing is watched. A client that closes only its
    sending half looks the same as one that is gone, and is treated so.
    """

    def __init__(self, sock: socket.socket | None, generation: Generation | None) -> None:
        self._greenlet = None
        if sock is not None and generation is not None:
            self._greenlet = gevent.spawn(_cancel_when_gone, sock, generation)

    def __enter__(self) -> DisconnectWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()
            self._greenlet = None


def _cancel_when_gone(sock: socket.socket, generation: Generation) -> None:
    try:
        # TLS has no peek, and its closing alert would look like a request.
        if isinstance(sock, ssl.SSLSocket) or not _closed_at_next_read(sock):
            _wait_for_closed_state(sock)
    except ConnectionError:
        pass  # a reset is a goodbye as well
    except OSError:
        return  # not a socket that can be watched: the next write will tell
    generation.cancel()


def _closed_at_next_read(sock: socket.socket) -> bool:
    """False when bytes came instead: the client has sent its next request already."""
    wait_read(sock.fileno())
    return sock.recv(1, socket.MSG_PEEK) == b""


def _wait_for_closed_state(sock: socket.socket) -> None:
    while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _OPEN_STATES:
        gevent.sleep(_POLL_S)
