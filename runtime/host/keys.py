"""Who may speak to an engine host over TCP: whoever has the file that holds its key.

A secret becomes two key pairs of ZeroMQ's CURVE, the host's and its clients'. What goes over the
wire is encrypted, a host takes no client with another key, and a client no such host.
Source: RFC 26/CurveZMQ, 27/ZAP.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq
from zmq.utils import z85

from enginehouse.runtime.machine.secret_file import read_secret

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator


class KeyPair(NamedTuple):
    """In ZeroMQ's Z85."""

    public: bytes
    secret: bytes


class HostKey:
    """Made of what is in a file: see read_key."""

    def __init__(self, secret: bytes) -> None:
        self._host, self._client = (_pair(secret, role) for role in (b"host", b"client"))

    def secure_client(self, socket: Any) -> None:
        """Before it connects: it then finds no host but one with this key."""
        socket.curve_publickey, socket.curve_secretkey = self._client
        socket.curve_serverkey = self._host.public

    def secure_host(self, socket: zmq.Socket[bytes]) -> ThreadAuthenticator:
        """Before it binds: it then takes no client but those with this key. The thread that asks
        them is to be stopped before the socket's context ends.
        """
        from zmq.auth.thread import ThreadAuthenticator  # a worker needs none

        door = ThreadAuthenticator(socket.context)
        door.start()
        door.configure_curve_callback("*", self)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._host
        return door

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key may come in; asked by ZeroMQ's authenticator."""
        return hmac.compare_digest(key, self._client.public)


def read_key(path: Path) -> HostKey:
    """Raises EnginehouseError for a file that holds none."""
    return HostKey(read_secret(path))


def _pair(secret: bytes, role: bytes) -> KeyPair:
    digest = hashlib.blake2b(secret, digest_size=32, person=b"enginehouse." + role[:4])
    found = z85.encode(digest.digest())
    return KeyPair(zmq.curve_public(found), found)
