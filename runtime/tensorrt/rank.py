"""One rank of an engine on its GPU: weights, slots and plans, doing what the leader tells.

The leader has one in its own process; every other rank is a process of this module, which reads
commands from a pipe until that ends: the leader's child, or on another machine `enginehouse-rank`.
Knows no sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from enginehouse.runtime.engine import Engine, read_engine
from enginehouse.runtime.errors import EngineError, EnginehouseError
from enginehouse.runtime.machine.device import free_memory, to_device
from enginehouse.runtime.machine.secret_file import read_secret
from enginehouse.runtime.tensorrt.commands import (
    ClearSlot,
    Command,
    CopyRows,
    KeepKernels,
    Start,
    Step,
    SwapRows,
    step_layout,
)
from enginehouse.runtime.tensorrt.inputs import cache_sizes, fixed_inputs
from enginehouse.runtime.tensorrt.machine import check_machine, check_plan, find_matching
from enginehouse.runtime.tensorrt.manifest import (
    Built,
    PlanRecord,
    plans_for,
    rank_files,
    read_built,
)
from enginehouse.runtime.tensorrt.nccl import Communicator
from enginehouse.runtime.tensorrt.package import Words
from enginehouse.runtime.tensorrt.plan import LoadedPart, LoadedPlan
from enginehouse.runtime.tensorrt.plan_file import PlanFile
from enginehouse.runtime.tensorrt.remote_ranks import LeaderLost, join_leader

_END_S = 5.0  # no step takes as long
_LOOK_AGAIN_S = 1e-3


def require_cuda() -> None:
    """EngineError when torch, in which logits are sampled and rows copied, has no GPU."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"torch {torch.__version__} finds no GPU; install a CUDA build of torch, in which "
            "the logits of TensorRT plans are sampled"
        )


class TensorRTRank:
    """One rank, loaded; `logits` are those of the last step, float32 [batch, vocab_size].

    All of its work goes through one stream, which becomes the thread's own: that thread alone
    may use it. free_bytes: what the GPU has left for the slots.
    """

    def __init__(self, engine: Engine, built: Built, trt: Any, rank: int, max_seq_len: int) -> None:
        self.engine = engine
        self.rank = rank
        self.records = plans_for(built, max_seq_len)
        require_cuda()
        self.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)
        torch.cuda.set_stream(self._stream)
        words = Words(trt)
        runtime = trt.Runtime(words.logger)
        names = rank_files(self.records, rank)
        for name in names:
            check_plan(trt, runtime, engine.path / name)
        self._baked = built.baked
        self._weights = fixed_inputs(engine, built, self.records, rank, self.device)
        common = trt, built.package, words, runtime
        self._files = {
            name: PlanFile(*common, engine.path / name, self._cache_file(built, name))
            for name in names
        }
        most = max(file.scratch_bytes for file in self._files.values())
        self._scratch = torch.empty(max(1, most), dtype=torch.uint8, device=self.device)
        self.plans = [self._load_plan(record) for record in self.records]
        batch = max(record.batch for record in self.records)
        chunk = max(record.chunk for record in self.records)
        tokens = max(batch, chunk)  # the most that a step has, of however many sequences
        size = step_layout(batch, -(-tokens // batch))[1]
        self._fed = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._hidden = self._hidden_states(tokens)
        self.logits = torch.zeros(batch, engine.config.vocab_size, device=self.device)
        self.communicator: Communicator | None = None
        torch.cuda.empty_cache()  # what loading the weights took besides
        self.free_bytes = free_memory(self.device)

    def _cache_file(self, built: Built, name: str) -> Path:
        """Beside the engine, named after all that TensorRT's kernels depend on."""
        major, minor = torch.cuda.get_device_capability(self.device)
        digest = self.engine.manifest.files[name].sha256[:16]
        folder = self.engine.path.with_name(self.engine.path.name + ".kernels")
        return folder / f"{digest}-sm{major}{minor}-{built.package}-{built.version}.cache"

    def _load_plan(self, record: PlanRecord) -> LoadedPlan:
        stream = int(self._stream.cuda_stream)
        return LoadedPlan(
            [
                LoadedPart(self._files[part.file(self.rank)], part.layers, stream, self._scratch)
                for part in record.parts
            ]
        )

    def _hidden_states(self, num_tokens: int) -> list[Tensor]:
        """Where parts hand on what they made of a step: twice [1, tokens, hidden_size], of no
        tokens where every plan is whole.
        """
        config = self.engine.config
        cut = any(len(record.parts) > 1 for record in self.records)
        shape = (1, num_tokens if cut else 0, config.hidden_size)
        dtype: torch.dtype = getattr(torch, config.dtype)
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)]

    def row_bytes(self) -> int:
        """Of one token in this rank's caches."""
        config = self.engine.config
        itemsize: int = getattr(torch, config.dtype).itemsize
        return sum(heads * size for heads, size in cache_sizes(config).values()) * itemsize

    def do(self, command: Command) -> None:
        """Enqueue a command. Raises EngineError when TensorRT refuses it."""
        if isinstance(command, Step):
            data = torch.frombuffer(bytearray(command.data), dtype=torch.int32)
            self._fed[: len(data)].copy_(to_device(data, self.device))
            self.plans[command.plan].run(command)
        elif isinstance(command, CopyRows):
            pairs = zip(
                self.plans[command.plan].caches.values(),
                self.plans[command.to_plan].caches.values(),
                strict=True,
            )
            for cache, other in pairs:
                rows = cache[command.slot, :, : command.num_rows]
                other[command.to_slot, :, : command.num_rows].copy_(rows)
        elif isinstance(command, SwapRows):
            for cache in self.plans[command.plan].caches.values():
                one = cache[command.slot, :, : command.num_rows]
                other = cache[command.other, :, : command.num_rows]
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        elif isinstance(command, ClearSlot):
            for cache in self.plans[command.plan].caches.values():
                cache[command.slot].zero_()
        elif isinstance(command, KeepKernels):
            self._keep_kernels()
        else:
            self._start(command)

    def _start(self, command: Start) -> None:
        config = self.engine.config
        dtype: torch.dtype = getattr(torch, config.dtype)
        sizes = cache_sizes(config)
        for plan, record, count in zip(self.plans, self.records, command.num_slots, strict=True):
            # Zeroed once: a masked row is multiplied by 0, which must not meet NaN.
            caches = {
                name: torch.zeros(
                    (count, heads, record.context, size), dtype=dtype, device=self.device
                )
                for name, (heads, size) in (sizes.items() if count else ())
            }
            if count:
                plan.bind(self._weights, caches, self._fed, self._hidden, self.logits)
        if command.nccl_id:
            ranks = config.mapping.tp_size
            self.communicator = Communicator(command.nccl_id, ranks, self.rank)
            for plan in self.plans:
                plan.share_communicator(self.communicator.capsule)

    def _keep_kernels(self) -> None:
        """After what is under way. Files that all ranks have are the first rank's to keep."""
        if self.rank == 0 or self._baked:
            torch.cuda.synchronize(self.device)
            for file in self._files.values():
                file.save_runtime_cache()

    def close(self) -> None:
        """Free the GPU: contexts when their work is done, and before their communicator, which is
        aborted first only where the work does not end, as it waits for a rank that is gone.
        """
        if not self._ends() and self.communicator is not None:
            self.communicator.abort()
        self.plans.clear()
        self._files.clear()
        self._weights.clear()
        if self.communicator is not None:
            self.communicator.abort()

    def _ends(self) -> bool:
        """Wait for what is under way; False when it fails or takes long."""
        try:
            event = torch.cuda.Event()
            event.record()
            until_s = time.monotonic() + _END_S
            while not event.query():
                if time.monotonic() > until_s:
                    return False
                time.sleep(_LOOK_AGAIN_S)
        except RuntimeError:  # CUDA's
            return False
        return True


def follow(rank: TensorRTRank, pipe: Connection) -> None:
    """Say what the rank has free, then do what comes through the pipe until it ends."""
    pipe.send_bytes(json.dumps({"free_bytes": rank.free_bytes}).encode())
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):  # the leader is done, or gone
            return
        command = msgspec.msgpack.decode(data, type=Command)
        rank.do(command)
        if isinstance(command, Start):
            pipe.send_bytes(b'{"started": true}')


def main(argv: list[str] | None = None) -> int:
    """A following rank's process.

    Exit status 0 when its leader has ended, 2 in a sentence when it cannot be a rank here, 75
    (EX_TEMPFAIL) when it lost its leader or failed beside it: to start it again may help.
    """
    parser = argparse.ArgumentParser(
        prog="enginehouse-rank",
        description="One rank of an engine of TensorRT plans, on a machine beside its leader's. "
        "The leader is `enginehouse serve` with ENGINEHOUSE_RANKS_ADDRESS; it tells what to do, "
        "and the rank ends with it.",
    )
    parser.add_argument("engine", type=Path, help="the leader's engine, on this machine's disk")
    parser.add_argument("--rank", type=int, required=True, help="from 1 on; 0 is the leader")
    parser.add_argument("--leader", metavar="HOST:PORT", help="where it waits for ranks")
    parser.add_argument("--key-file", type=Path, help="the secret that both prove to have")
    parser.add_argument(
        "--wait-s", type=float, default=1200.0, help="for the leader (default 1200)"
    )
    parser.add_argument("--max-seq-len", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)  # a descriptor, of a child
    args = parser.parse_args(argv)
    if args.pipe is None and (args.leader is None or args.key_file is None):
        parser.error("--leader and --key-file are wanted")
    for number in (signal.SIGTERM, signal.SIGINT) if args.pipe is not None else ():
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; it ends with its pipe
    pipe: Connection | None = None
    try:
        engine = read_engine(args.engine)
        pipe, max_seq_len = _leader_of(args, engine)
        if args.pipe is None:
            built, trt = check_machine(engine, 1)
        else:  # its leader has looked
            built = read_built(engine)
            trt = find_matching(engine, built)
        rank = TensorRTRank(engine, built, trt, args.rank, max_seq_len)
    except LeaderLost as error:
        print(f"enginehouse-rank: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except (EnginehouseError, torch.cuda.OutOfMemoryError) as error:
        return _fail(args, pipe, error, 2)
    try:
        follow(rank, pipe)
    except (EnginehouseError, torch.cuda.OutOfMemoryError) as error:
        return _fail(args, pipe, error, os.EX_TEMPFAIL)
    except RuntimeError as error:  # CUDA's: where it came from is worth reading
        traceback.print_exc()
        return _fail(args, pipe, error, os.EX_TEMPFAIL)
    finally:
        rank.close()
    return 0


def _fail(args: argparse.Namespace, pipe: Connection | None, error: Exception, status: int) -> int:
    """Tell the leader, which may be gone; on another machine than its own say it here too."""
    if pipe is not None:
        with suppress(OSError):
            pipe.send_bytes(json.dumps({"error": str(error)}).encode())
    if args.pipe is None:
        print(f"enginehouse-rank: {error}", file=sys.stderr)
    return status


def _leader_of(args: argparse.Namespace, engine: Engine) -> tuple[Connection, int]:
    """The pipe to it, and the context that it serves."""
    if args.pipe is not None:
        return Connection(args.pipe), args.max_seq_len
    ranks = engine.config.mapping.world_size
    if not 0 < args.rank < ranks:
        raise EngineError(f"--rank {args.rank}; {engine.path} has ranks 1 to {ranks - 1} to follow")
    secret, digest = read_secret(args.key_file), str(engine.manifest.digest)
    pipe, told = join_leader(args.leader, secret, args.rank, digest, args.wait_s)
    return pipe, int(told["max_seq_len"])


if __name__ == "__main__":
    sys.exit(main())
