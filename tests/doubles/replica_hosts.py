"""Engine hosts that can be started, held, ended and counted: replicas without an engine.

A prompt's tokens are answered plus one, a token an iteration, of any engine digest.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from enginehouse.runtime.host.admission import QueueLimits
from enginehouse.runtime.host.process import EngineHost
from enginehouse.runtime.request import (
    EngineInfo,
    ExecutorStats,
    FinishReason,
    Request,
    TokenOutput,
)
from enginehouse.server.replicas.replicas_file import Replica, write_replicas

INFO = EngineInfo(
    name="scripted",
    model="scripted",
    quantization="none",
    backend="torch",
    tp_size=1,
    pp_size=1,
    max_seq_len=64,
    max_batch_size=4,
    max_num_tokens=64,
    vocab_size=100,
    kv_block_size=16,
    num_kv_blocks=8,
    kv_cache_bytes=1 << 20,
    eos_token_ids=(2,),
    digest="sha256:old",
    created=0,
)


class PacedExecutor:
    """held: as long as it is set, nothing is computed."""

    def __init__(self, digest: str) -> None:
        self.info = dataclasses.replace(INFO, digest=digest)
        self.running: dict[int, Iterator[int]] = {}
        self.held = threading.Event()
        self.num_taken = self.num_generated = 0
        self.on_planned: Callable[[], None] = lambda: None

    def submit(self, request: Request) -> None:
        self.num_taken += 1
        tokens = itertools.islice(itertools.cycle(request.prompt_ids), request.sampling.max_tokens)
        self.running[request.request_id] = (token + 1 for token in tokens)

    def cancel(self, request_id: int) -> None:
        self.running.pop(request_id, None)

    def waits(self, request_id: int) -> bool:
        return False

    def poll(self, timeout_s: float = 0.0) -> list[TokenOutput]:
        self.on_planned()
        threading.Event().wait(0.001)
        outputs = []
        for request_id, tokens in list(self.running.items()) if not self.held.is_set() else []:
            token = next(tokens, None)
            if token is None:
                del self.running[request_id]
                outputs.append(TokenOutput(request_id, [], FinishReason.LENGTH))
            else:
                self.num_generated += 1
                outputs.append(TokenOutput(request_id, [token]))
        return outputs

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def stats(self) -> ExecutorStats:
        return ExecutorStats(num_running=len(self.running), num_generated_tokens=self.num_generated)

    def close(self) -> None:
        self.running.clear()


class ReplicaHost:
    """An EngineHost on a native thread, as its process would run it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        digest: str = "sha256:old",
        limits: QueueLimits = QueueLimits(),  # noqa: B008
    ) -> None:
        self.replica = Replica(name, f"ipc://{folder}/{name}", digest)
        self.executor = PacedExecutor(digest)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(self.replica.address)
        self._stopping = threading.Event()
        host = EngineHost(self.executor, socket, limits)
        self._thread = threading.Thread(
            target=host.run, args=(lambda: not self._stopping.is_set(),)
        )
        self._thread.start()

    def stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join(10)
            self._socket.close()
            self._context.term()


def name_hosts(path: Path, *hosts: ReplicaHost) -> None:
    """In the replicas file."""
    write_replicas(path, [host.replica for host in hosts])
