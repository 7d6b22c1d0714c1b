"""NCCL's part of a machine that has none: ranks that wait for each other and exchange tensors.

Each rank computes its own network, whose collectives go through here: between threads, or between
two processes over a socket.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from doubles.recording_network import RecordingNetwork

_WAIT_S = 60


class Exchange:
    """A `nccl.Communicator` whose capsule is itself."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        self.num_ranks = num_ranks
        self.rank = rank
        self.capsule = self
        self.aborted = False
        self._joined: dict[int, RecordingNetwork] = {}

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the ranks' order."""
        raise NotImplementedError

    def wait(self) -> None:
        self.exchange(torch.zeros(1))

    def run(self, network: RecordingNetwork, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's outputs; all ranks must run alike steps."""
        if id(network) not in self._joined:
            self._joined[id(network)] = network
            for layer in network.layers:
                if layer.collective is not None:
                    assert layer.num_ranks == self.num_ranks
                    layer.collective, layer.num_ranks = self._joined_up(layer.collective), 1
        sizes = [size for name in sorted(feeds) for size in feeds[name].shape]
        shapes = self.exchange(torch.tensor(sizes))
        assert all(torch.equal(shapes[0], shape) for shape in shapes), "the ranks run unlike steps"
        (found,) = network.run([feeds])
        return found

    def _joined_up(
        self, collective: Callable[[list[Tensor]], list[Tensor]]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda parts: [collective(self.exchange(parts[0]))[self.rank]]

    def abort(self) -> None:
        self.aborted = True


class _Group:
    """Threads that wait for each other, and what each of them shows."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks)
        self.shown: list[Tensor] = [torch.empty(0)] * num_ranks


class ThreadCommunicator(Exchange):
    """Ranks in threads of this process."""

    groups: dict[bytes, _Group] = {}

    def __init__(self, nccl_id: bytes, num_ranks: int, rank: int) -> None:
        super().__init__(num_ranks, rank)
        self._group = self.groups.setdefault(nccl_id, _Group(num_ranks))

    @classmethod
    def make_id(cls) -> bytes:
        return f"group {len(cls.groups)}".encode().ljust(128)

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self._group.shown[self.rank] = tensor
        self._group.barrier.wait(_WAIT_S)
        found = [shown.clone() for shown in self._group.shown]
        self._group.barrier.wait(_WAIT_S)
        return found


def _accept(address: str) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(_WAIT_S)
        listener.bind(address)
        listener.listen(1)
        return listener.accept()[0]


def _connect(address: str) -> socket.socket:
    """To who may not listen yet, though its address is there."""
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.connect(address)
            return peer
        except OSError:
            peer.close()
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


class PeerCommunicator(Exchange):
    """Two ranks in two processes."""

    def __init__(self, nccl_id: bytes, num_ranks: int, rank: int) -> None:
        super().__init__(num_ranks, rank)
        assert num_ranks == 2
        address = nccl_id.rstrip(b"\0").decode()
        with _accept(address) if rank == 0 else _connect(address) as peer:
            peer.setblocking(True)
            self._peer = Connection(peer.detach())

    @classmethod
    def make_id(cls) -> bytes:
        return f"{tempfile.mkdtemp()}/peer".encode().ljust(128, b"\0")

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        data = tensor.flatten().clone().numpy().tobytes()
        if self.rank == 0:
            self._peer.send_bytes(data)
        other = bytearray(self._peer.recv_bytes())
        if self.rank == 1:
            self._peer.send_bytes(data)
        theirs = torch.frombuffer(other, dtype=tensor.dtype).view(tensor.shape)
        return [tensor, theirs] if self.rank == 0 else [theirs, tensor]
