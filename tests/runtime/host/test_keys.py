"""A host on TCP, spoken to with its key, with another and with none."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
import zmq
from zmq.utils import z85

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.host import messages
from enginehouse.runtime.host.client import EngineClient
from enginehouse.runtime.host.keys import HostKey, read_key
from enginehouse.runtime.host.listening import Listening

SECRET = b"s" * 40


class Door:
    """A socket that answers whoever comes in, on a native thread."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.door = HostKey(SECRET).secure_host(self.socket)
        self.address = Listening(self.socket, "tcp://127.0.0.1:0", 0.0).address
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.stopping.is_set():
            if self.socket.poll(10):
                client, _ = self.socket.recv_multipart()
                said = messages.encode(messages.Refused("answered"))
                self.socket.send_multipart([client, said])

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join(10)
        self.socket.close(0)
        self.door.stop()
        self.context.term()


@pytest.fixture
def door() -> Iterator[Door]:
    opened = Door()
    yield opened
    opened.stop()


def test_who_has_the_key_is_answered_and_nobody_else_is_heard(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    assert not door.address.endswith(":0"), "the port that the system chose is told"
    asking = ((HostKey(b"t" * 40), False), (None, False), (HostKey(SECRET), True))
    for key, is_answered in asking:
        with caplog.at_level(logging.ERROR, "enginehouse.client"):
            caplog.clear()
            client = EngineClient(door.address, key)
            with gevent.Timeout(5.0 if is_answered else 0.4, False):
                while "answered" not in caplog.text:
                    gevent.sleep(0.01)
            client.close()
        assert ("answered" in caplog.text) == is_answered


def test_the_keys_of_hosts_and_clients_are_two() -> None:
    key = HostKey(SECRET)
    public = {
        role: zmq.curve_public(
            z85.encode(
                hashlib.blake2b(SECRET, digest_size=32, person=b"enginehouse." + role).digest()
            )
        )
        for role in (b"clie", b"host")
    }
    assert key.callback("", public[b"clie"]) and not key.callback("", public[b"host"])


def test_a_key_file_is_one_long_line(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for text in ("", "short", "a" * 20 + "\n" + "b" * 20, "ä" * 40, "a" * 1025):
        path.write_text(text)
        with pytest.raises(EnginehouseError, match="openssl rand -hex 32"):
            read_key(path)
    with pytest.raises(EnginehouseError, match="cannot be read"):
        read_key(tmp_path / "none")
    path.write_text("a" * 64 + "\n")
    assert read_key(path).callback("", b"x" * 40) is False
