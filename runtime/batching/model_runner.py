"""What the in-flight batching loop asks of a backend: weights, keys and values, and one iteration.

All that differs between the torch backend and TensorRT, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from enginehouse.runtime.batching.scheduler import KVMemory
from enginehouse.runtime.batching.sequence import Chunk, ScoredRow

Score = Callable[[Sequence[ScoredRow], Tensor], None]


class Capacity(NamedTuple):
    """What a runner takes at most: tokens of a sequence, sequences at once, tokens at once, and
    those of one prompt at once whose log probabilities are wanted (None: as many as of others).
    """

    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    max_scored_tokens: int | None = None


class ModelRunner(Protocol):
    """One loaded model. Not thread-safe: the loop owns it.

    device: where logits come from, and where sampling therefore runs. memory: what the scheduler
    gives out. pretrained: the longest context that longrope's short factors serve, None where
    nothing changes with the length. kv_cache_bytes: what memory's blocks take in all, on each GPU.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def memory(self) -> KVMemory: ...

    @property
    def kv_cache_bytes(self) -> int: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def pretrained(self) -> int | None: ...

    def compute(self, chunks: list[Chunk], score: Score) -> Tensor:
        """Keys and values of every chunk, and the logits behind those that complete their sequence.

        score: is given the rows that chunks have `scored`, in the order of each one's positions,
        with their logits, float32 [rows, vocab_size]; as often as suits the runner, so that those
        of a long prompt are never there at once.

        Returns float32 [complete chunks, vocab_size] in the chunks' order, free to be changed.
        Raises EngineError when the engine can compute no more.
        """

    def close(self) -> None:
        """Free weights and memory."""
