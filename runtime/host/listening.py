"""Where a host listens: a file, for `ipc://`, which cleaners of /tmp may take away.

Who is connected stays so; a worker that starts later would find nobody. Knows no message.
"""

from __future__ import annotations

import logging
from pathlib import Path

import zmq

log = logging.getLogger("enginehouse.host")


class Listening:
    """Binds the socket, and binds it again once its file is gone. Raises ZMQError."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self._socket, self._address = socket, address
        is_file = address.startswith("ipc://")
        self._path = Path(address.removeprefix("ipc://")) if is_file else None
        socket.bind(address)

    def keep(self) -> None:
        """Nothing can be done where the file's folder is gone too: new workers are not ready."""
        path = self._path
        if path is not None and not path.exists() and path.parent.exists():
            log.warning("the socket's file %s was removed; it is made again", path)
            self._socket.bind(self._address)
