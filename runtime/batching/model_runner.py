"""What the in-flight batching loop asks of a backend: weights, keys and values, and one iteration.

All that differs between the torch backend and TensorRT, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from enginehouse.runtime.batching.sampling_state import Sampled, SamplingState
from enginehouse.runtime.batching.scheduler import KVMemory
from enginehouse.runtime.batching.sequence import Chunk, ScoredRow
from enginehouse.runtime.request import TokenLogprobs


class Logits(Protocol):
    """Rows of an iteration's logits, wherever they are; of use until the runner computes more.

    What raises in the part of one row's work that is its sequence's is that state's `error`.
    """

    def sample(self, rows: Sequence[int], states: Sequence[SamplingState]) -> list[Sampled]:
        """The next token behind each of these rows, by its sequence's state: no row and no state
        twice. Of several rows of one sequence the next is asked for when its state has accepted
        the token of the last.
        """

    def score(self, rows: Sequence[ScoredRow]) -> list[TokenLogprobs | None]:
        """What each row, in their order, says of its next token; None where that raised."""


Score = Callable[[Sequence[ScoredRow], Logits], None]


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

    memory: what the scheduler gives out. pretrained: the longest context that longrope's short
    factors serve, None where nothing changes with the length. kv_cache_bytes: what memory's blocks
    take in all, on each GPU. embedding_size: the numbers of a hidden state; 0 where none are told.
    """

    @property
    def memory(self) -> KVMemory: ...

    @property
    def kv_cache_bytes(self) -> int: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def pretrained(self) -> int | None: ...

    @property
    def embedding_size(self) -> int: ...

    def compute(self, chunks: list[Chunk], score: Score) -> Logits:
        """Keys and values of every chunk, and the logits behind those that complete their sequence,
        a row each in the chunks' order.

        score: is given the rows that chunks have `scored`, in the order of each one's positions,
        with their logits; as often as suits the runner, so that those of a long prompt are never
        there at once.

        Raises EngineError when the engine can compute no more.
        """

    def hidden_states(self, rows: Sequence[int]) -> np.ndarray:
        """Behind the last norm, of rows of what was computed last: float32 [rows, embedding_size].
        Asked for only where that is not 0.
        """

    def close(self) -> None:
        """Free weights and memory."""
