"""Where a host listens: a file, for `ipc://`, which cleaners of /tmp may take away.

Who is connected stays so; a worker that starts later would find nobody. Knows no message.
"""

from __future__ import annotations

import logging
from pathlib import Path

import zmq

log = logging.getLogger("enginehouse.host")

_LOOK_S = 1.0


def file_of(address: str) -> Path | None:
    """The socket's, which is there once a host listens; None of an address that has none."""
    return Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None


class Listening:
    """Binds the socket, and binds it again once its file is gone. Raises ZMQError."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, now_s: float) -> None:
        self._socket, self._address = socket, address
        self._path, self._next_s = file_of(address), now_s + _LOOK_S
        socket.bind(address)
        # As it is to be told: with the port that the system chose.
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.address = bound.decode().rstrip("\0")

    def keep(self, now_s: float) -> None:
        """Once a second. Nothing can be done where the file's folder is gone too: new workers are
        not ready.
        """
        if now_s < self._next_s:
            return
        self._next_s = now_s + _LOOK_S
        path = self._path
        if path is not None and not path.exists() and path.parent.exists():
            log.warning("the socket's file %s was removed; it is made again", path)
            self._socket.bind(self._address)
