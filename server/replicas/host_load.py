"""What runs and waits at a host, asked of it by whoever starts it: a client that submits nothing.

On a thread of its own, without gevent. Knows no Ray.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import zmq

from enginehouse.runtime.host import messages
from enginehouse.runtime.host.keys import HostKey

_POLL_MS = 200


class Load(NamedTuple):
    """Sequences."""

    num_running: int
    num_waiting: int

    @property
    def total(self) -> int:
        return self.num_running + self.num_waiting


class HostLoad:
    """The latest that the host at an address has told, about once a second."""

    def __init__(self, address: str, key: HostKey | None) -> None:
        self._latest = Load(0, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(address, key), daemon=True)
        self._thread.start()

    @property
    def latest(self) -> Load:
        return self._latest

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self, address: str, key: HostKey | None) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
            if key is not None:
                key.secure_client(socket)
            socket.connect(address)
            socket.send(messages.encode(messages.Hello(messages.PROTOCOL_VERSION)))
            while not self._ended.is_set():
                if socket.poll(_POLL_MS):
                    message = messages.decode_to_worker(socket.recv())
                    if isinstance(message, messages.Stats):
                        stats = message.stats
                        self._latest = Load(stats.num_running, stats.num_waiting)
        context.term()
