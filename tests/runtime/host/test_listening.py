from __future__ import annotations

import shutil
from pathlib import Path

import zmq

from enginehouse.runtime.host.listening import Listening

DEADLINE_MS = 60_000


def test_a_socket_whose_file_was_removed_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    address = f"ipc://{folder}/engine"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as host:
        listening = Listening(host, address, 0.0)
        clients = []
        for now_s, name in ((5.0, b"before"), (6.0, b"after")):
            clients.append(context.socket(zmq.DEALER))
            clients[-1].connect(address)
            for client in clients:  # who was there before is heard too
                client.send(name)
                assert host.poll(DEADLINE_MS) and host.recv_multipart()[1] == name
            (folder / "engine").unlink()
            if name == b"after":
                listening.keep(5.9)
            assert not (folder / "engine").exists(), "it looks once a second"
            listening.keep(now_s)
        shutil.rmtree(folder)
        listening.keep(7.0)
        for client in clients:
            client.close(0)


def test_an_address_that_is_no_file_is_left_alone() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as host:
        Listening(host, "tcp://127.0.0.1:*", 0.0).keep(5.0)
