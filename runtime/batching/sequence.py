"""A request on its way through the engine, and the part of it that one iteration computes.

Knows neither tensors nor who else is running.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from enginehouse.runtime.batching.drafts import Lookup
from enginehouse.runtime.batching.kv_cache import ROOT_HASH, BlockHash
from enginehouse.runtime.batching.pooling import PooledPrompt
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.request import GIVES_WAY, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens so far, and how many have their keys and values.

    Where those are is the memory's to know: blocks, hashes, num_remembered and slot are
    `BlockMemory`'s.
    """

    request: Request
    sampling: SamplingState
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks, as far as needed
    slot: int = 0  # of what is kept of it beside its blocks
    num_remembered: int = 0  # blocks already given to the pool under their hash
    num_cached_tokens: int | None = None  # found at the first admission
    root_hash: BlockHash = ROOT_HASH  # before the first block: only equal roots share a prefix
    arrival: int = 0  # numbered by the scheduler
    spoiled: bool = False  # its logits were not finite, and so may its keys and values be
    arrived_s: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0  # from its arrival to its first admission
    num_scored: int = 0  # the prompt's tokens, from its second on, whose logprobs are known
    lookup: Lookup | None = None  # once something was to be drafted
    pooled: PooledPrompt | None = None  # where an embedding is wanted

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_unscored(self) -> int:
        """Tokens of the prompt whose log probability is still wanted."""
        if self.request.sampling.num_prompt_logprobs is None:
            return 0
        return len(self.request.prompt_ids) - 1 - self.num_scored

    @property
    def computes_all(self) -> bool:
        """Every token of the prompt must be computed: what is found in a cache has no logits and no
        hidden state.
        """
        return self.num_unscored > 0 or (self.pooled is not None and self.pooled.wants_all)

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: the lower priority, then the earlier."""
        return self.request.priority, self.arrival

    @property
    def gives_way(self) -> bool:
        """It is computed only while nothing is there that comes first."""
        return self.request.priority >= GIVES_WAY

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed


class Chunk(NamedTuple):
    """A run of one sequence's tokens: [start, start + num_tokens) are computed this iteration, and
    a draft of those that may follow.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled afterwards."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)

    @property
    def chooses(self) -> bool:
        """Whether its next token is to be sampled."""
        return self.completes and self.sequence.request.sampling.max_tokens > 0

    @property
    def num_rows(self) -> int:
        """Tokens that are computed, the draft's included."""
        return self.num_tokens + len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """Those of its rows."""
        known = self.sequence.token_ids[self.start : self.start + self.num_tokens]
        return [*known, *self.draft]

    @property
    def scored(self) -> range:
        """The positions whose logits say how likely the prompt's next token is, where that is
        wanted and not known yet.
        """
        sequence = self.sequence
        if not sequence.num_unscored:
            return range(0)
        end = min(self.start + self.num_tokens, len(sequence.request.prompt_ids) - 1)
        return range(max(self.start, sequence.num_scored), end)

    @property
    def pooled(self) -> range:
        """The positions whose hidden states are wanted for an embedding."""
        pooled = self.sequence.pooled
        return (
            range(0) if pooled is None else pooled.wanted(self.start, self.start + self.num_tokens)
        )


class ScoredRow(NamedTuple):
    """Of a sequence's prompt the position whose logits say how likely the next token is."""

    sequence: Sequence
    position: int

    @property
    def next_token(self) -> int:
        return self.sequence.token_ids[self.position + 1]


def chosen_rows(chunks: list[Chunk]) -> Iterator[int]:
    """The rows of a step behind which tokens may be chosen: of each chunk that chooses the last
    token's, and its draft's.
    """
    end = 0
    for chunk in chunks:
        end += chunk.num_rows
        if chunk.chooses:
            yield from range(end - len(chunk.draft) - 1, end)


def scored_rows(chunks: list[Chunk]) -> Iterator[tuple[int, ScoredRow]]:
    """The rows of a step that score a prompt's tokens, each with its place in the step."""
    first = 0
    for chunk in chunks:
        for position in chunk.scored:
            yield first + position - chunk.start, ScoredRow(chunk.sequence, position)
        first += chunk.num_rows


def pooled_rows(chunks: list[Chunk]) -> Iterator[tuple[Sequence, list[int]]]:
    """Of each prompt that is pooled, the rows of a step that it is pooled from."""
    first = 0
    for chunk in chunks:
        if positions := chunk.pooled:
            yield chunk.sequence, [first + position - chunk.start for position in positions]
        first += chunk.num_rows
