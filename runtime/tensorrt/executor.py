"""TensorRT plans behind the in-flight batching loop: slots, steps and ranks put together.

Needs the GPU and the package that the engine was compiled for. **No GPU has run it yet**: what
was verified instead is in docs/tensorrt.md.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from enginehouse.runtime.batching.inflight_executor import InflightExecutor
from enginehouse.runtime.batching.logprobs import TorchLogits
from enginehouse.runtime.batching.model_runner import Capacity, Score
from enginehouse.runtime.batching.sequence import Chunk, ScoredRow
from enginehouse.runtime.engine import Engine, read_engine, verify_files
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, limit_within
from enginehouse.runtime.machine.secret_file import read_secret
from enginehouse.runtime.tensorrt.commands import Command, KeepKernels, Start
from enginehouse.runtime.tensorrt.followers import Come, Followers
from enginehouse.runtime.tensorrt.inputs import RotaryInputs
from enginehouse.runtime.tensorrt.machine import check_machine
from enginehouse.runtime.tensorrt.nccl import make_id
from enginehouse.runtime.tensorrt.rank import TensorRTRank, require_cuda
from enginehouse.runtime.tensorrt.remote_ranks import accept_ranks
from enginehouse.runtime.tensorrt.slots import SlotMemory
from enginehouse.runtime.tensorrt.steps import StepPlanner

# Of what is free once weights and contexts are there; the rest is for kernels that TensorRT makes
# as it runs, its CUDA graphs, and sampling.
_KV_SHARE = 0.8
_LOOK_AGAIN_S = 50e-6
_START_S = 1200.0  # for ranks of other machines to come
# The plans give the logits of one token of each sequence: a prompt whose own log probabilities are
# wanted goes through as if it were decoded, beside those that are.
_SCORED_TOKENS = 1
log = logging.getLogger("enginehouse.tensorrt")


def share_slots(
    contexts: Sequence[int], row_bytes: int, memory_bytes: int, batches: Sequence[int]
) -> list[int]:
    """How many slots each context gets: equal parts of the memory, at most its batch.

    What the longest leave goes to the shorter; the longest has one slot at least.
    Raises EngineError when not even that fits.
    """
    counts: list[int] = []
    left = memory_bytes
    for num_left in range(len(contexts), 0, -1):
        slot_bytes = contexts[num_left - 1] * row_bytes
        count = min(batches[num_left - 1], left // num_left // slot_bytes)
        if not counts and not count:
            count = min(1, left // slot_bytes)
        left -= count * slot_bytes
        counts.insert(0, count)
    if not counts[-1]:
        raise EngineError(
            f"the KV cache may take {memory_bytes / 2**30:.2f} GiB of each GPU; one sequence of "
            f"{contexts[-1]} tokens needs {contexts[-1] * row_bytes / 2**30:.2f} GiB: raise "
            "kv_cache_gib, lower max_seq_len or use more ranks"
        )
    return counts


def _coming(
    engine: Engine, max_seq_len: int, options: ExecutorOptions
) -> tuple[Come | None, int | None]:
    """How ranks of other machines are waited for, and how many are of this one."""
    remote = options.remote_ranks
    if remote is None:
        return None, None
    secret, digest = read_secret(remote.key_file), str(engine.manifest.digest)
    told = {"max_seq_len": max_seq_len}

    def come(ranks: Collection[int]) -> Mapping[int, Connection]:
        seconds = options.start_s or _START_S
        return accept_ranks(remote.address, secret, ranks, digest, told, seconds)

    return come, remote.num_local


class TensorRTRunner:
    """Satisfies `batching.model_runner.ModelRunner`: rank 0 here, the others as processes.

    Only the thread that opened it may use it.
    """

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        remote = options.remote_ranks
        built, trt = check_machine(engine, None if remote is None else remote.num_local)
        verify_files(engine)
        require_cuda()
        limits, config = engine.manifest.limits, engine.config
        max_seq_len = limit_within("max_seq_len", options.max_seq_len, limits.max_seq_len)
        batch = min(limits.max_batch_size, max(plan.batch for plan in built.plans))
        max_batch_size = limit_within("max_batch_size", options.max_batch_size, batch)
        max_num_tokens = max(options.max_num_tokens or limits.max_num_tokens, max_batch_size)
        self.capacity = Capacity(max_seq_len, max_batch_size, max_num_tokens, _SCORED_TOKENS)
        num_ranks = config.mapping.tp_size
        self._rank: TensorRTRank | None = None
        self._in_step = False  # whether all ranks have warmed up, and done alike since
        come, num_local = _coming(engine, max_seq_len, options)
        self._followers = Followers(
            engine.path, num_ranks, max_seq_len, self._abort, num_local, come
        )
        try:
            self._rank = TensorRTRank(engine, built, trt, 0, max_seq_len)
            free = [self._rank.free_bytes]
            free += [int(answer["free_bytes"]) for answer in self._followers.answers()]
            asked = options.kv_cache_gib or limits.kv_cache_gib
            memory_bytes = int(asked * 2**30 if asked else min(free) * _KV_SHARE)
            contexts = [record.context for record in self._rank.records]
            row_bytes = self._rank.row_bytes()
            batches = [min(max_batch_size, record.batch) for record in self._rank.records]
            counts = share_slots(contexts, row_bytes, memory_bytes, batches)
            rows = sum(map(operator.mul, contexts, counts))
            self.kv_cache_bytes = rows * row_bytes
            self._do(Start(counts, make_id() if num_ranks > 1 else b""))
            self._followers.answers()
            self._followers.watch_remote()
            self.memory = SlotMemory(contexts, counts, max_seq_len, not options.deterministic)
            self._rotary = RotaryInputs(config, self._rank.records[0].max_positions)
            self._planner = StepPlanner(self._rank.records, self.memory, self._rotary)
            for step in self._planner.warm_up():
                self._do(step)
            self._wait()
            self._in_step = True
        except BaseException:
            self.close()
            raise

    @property
    def pretrained(self) -> int | None:
        return self._rotary.pretrained

    embedding_size = 0

    def hidden_states(self, rows: Sequence[int]) -> np.ndarray:
        raise EngineError("TensorRT plans give logits and no hidden states")

    def _do(self, command: Command) -> None:
        """On every rank; the others first, as this one may wait for them."""
        assert self._rank is not None
        self._followers.tell(msgspec.msgpack.encode(command))
        try:
            self._rank.do(command)
        except (EngineError, RuntimeError):  # CUDA's are the latter
            self._in_step = False
            self._followers.check()  # a rank that has ended is the reason
            raise

    @torch.inference_mode()
    def compute(self, chunks: list[Chunk], score: Score) -> TorchLogits:
        assert self._rank is not None
        for move in self.memory.moves():
            self._do(move)
        rows: dict[int, Tensor] = {}
        for step, wanted in self._planner.steps(chunks):
            self._do(step)
            if wanted:
                logits = self._rank.logits[: step.batch].clone()  # the next step writes there too
                rows |= {id(chunk.sequence): logits[row] for chunk, row in wanted}
        self._wait()
        scored = [ScoredRow(c.sequence, position) for c in chunks for position in c.scored]
        if scored:
            score(scored, TorchLogits(torch.stack([rows[id(row.sequence)] for row in scored])))
        found = [rows[id(chunk.sequence)] for chunk in chunks if chunk.chooses]
        if not found:
            return TorchLogits(self._rank.logits[:0])
        return TorchLogits(torch.stack(found))

    def _wait(self) -> None:
        """With other ranks, until the step is done or one of them has ended; alone, the copy of
        the sampled tokens waits.
        """
        if self._rank is None or self._rank.communicator is None:
            return
        try:
            event = torch.cuda.Event()
            event.record()
            while not event.query():
                self._followers.check()
                time.sleep(_LOOK_AGAIN_S)
        finally:  # a rank that has ended is the reason of whatever CUDA says
            self._followers.check()

    def _abort(self) -> None:
        """A rank has ended: let nothing wait for it."""
        if self._rank is not None and self._rank.communicator is not None:
            self._rank.communicator.abort()

    def close(self) -> None:
        try:
            if self._in_step and not self._followers.lost:
                self._keep_kernels()
        finally:
            rank, self._rank, self._in_step = self._rank, None, False
            try:
                if rank is not None:
                    rank.close()
            finally:
                self._followers.close()

    def _keep_kernels(self) -> None:
        try:
            self._do(KeepKernels())
        except EngineError as error:
            log.warning("TensorRT's kernels are not kept: %s", error)


class TensorRTExecutor(InflightExecutor[TensorRTRunner]):
    """In-flight batching for engines built with `--backend tensorrt`."""

    def __init__(self, engine: Engine, options: ExecutorOptions) -> None:
        super().__init__(engine, TensorRTRunner(engine, options), options)


def open_tensorrt(engine_dir: Path, options: ExecutorOptions) -> TensorRTExecutor:
    """Load an engine of TensorRT plans. Raises EngineError, before it loads anything, where the
    machine or the package is not what the plans were compiled for, or a file is damaged.
    """
    return TensorRTExecutor(read_engine(engine_dir), options)
