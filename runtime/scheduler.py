"""In-flight batching: which sequence computes how many tokens in the next iteration.

Admits, chunks, decodes and preempts. It knows token ids and block ids; it knows neither
tensors nor logits, and the free list is the pool's.
Source: Orca (Yu et al., 2022), section 4.1; chunked prefill as in Sarathi (Agrawal et al., 2023).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from enginehouse.runtime.kv_cache import ROOT_HASH, BlockHash, BlockPool, hash_block
from enginehouse.runtime.request import FinishReason, Request
from enginehouse.runtime.sampling import SamplingState

_FIXED_CHUNK = 128


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens so far, how many are computed, and the blocks they fill."""

    request: Request
    sampling: SamplingState
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks, as far as needed
    num_remembered: int = 0  # blocks already given to the pool under their hash
    num_cached_tokens: int | None = None  # found at the first admission
    root_hash: BlockHash = ROOT_HASH  # before the first block: only equal roots share a prefix
    arrival: int = 0  # numbered by the scheduler

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: the lower priority, then the earlier."""
        return self.request.priority, self.arrival

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class Chunk(NamedTuple):
    """A run of one sequence's tokens: [start, start + num_tokens) are computed this iteration."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled afterwards."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


class Scheduler:
    """Owns the waiting and the running sequences.

    max_batch_size: sequences that run at once. max_num_tokens: tokens of one iteration, which
    bounds how long a prompt can hold up running streams. max_seq_len: prompt plus output.

    deterministic: how a sequence is cut into chunks depends on its own prompt alone, and no
    blocks are shared; else sequences with a seed share none, so that what the cache happens to
    hold cannot change their arithmetic.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        deterministic: bool = False,
    ) -> None:
        assert pool.num_blocks * block_size >= max_seq_len, "one sequence must always fit"
        assert max_num_tokens >= max_batch_size, "every running sequence must be able to decode"
        self.pool = pool
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_seq_len = max_seq_len
        self.deterministic = deterministic
        self._fixed_chunk = max(1, min(_FIXED_CHUNK, max_num_tokens - max_batch_size))
        self.waiting: list[Sequence] = []  # both by rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_arrivals = 0

    def add(self, sequence: Sequence) -> None:
        self._num_arrivals += 1
        sequence.arrival = self._num_arrivals
        insort(self.waiting, sequence, key=_rank)

    def schedule(self) -> list[Chunk]:
        """The next iteration: every decode, then chunks of prompts, by rank.

        Blocks are held, and full ones findable, when this returns: an iteration stores keys
        before it reads them, so a prefix can be shared within the very iteration that fills it.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_tokens
        decoding = [s for s in self.running if s.num_pending == 1]
        prefilling = [s for s in self.running if s.num_pending > 1]
        for sequence in decoding + prefilling:
            count = self._num_next(sequence, budget)
            if count and self._make_room(sequence, sequence.num_computed + count):
                chunks.append(self._chunk(sequence, count))
                budget -= count
        while budget and self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = self._num_next(sequence, budget)
            if not count:
                break
            chunks.append(self._chunk(sequence, count))
            budget -= count
        return chunks

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        """How many tokens to compute next.

        When deterministic: the prompt in pieces that begin at multiples of a fixed size, and
        every generated token by itself, as it was when it was generated.
        """
        if not self.deterministic:
            return min(sequence.num_pending, budget)
        left = len(sequence.request.prompt_ids) - sequence.num_computed
        size = self._fixed_chunk
        count = min(left, size - sequence.num_computed % size) if left > 0 else 1
        return count if count <= budget else 0

    def _shares(self, sequence: Sequence) -> bool:
        return not self.deterministic and sequence.request.sampling.seed is None

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        chunk = Chunk(sequence, sequence.num_computed, count)
        self._remember_full_blocks(sequence, chunk.start + count)
        return chunk

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for `num_tokens`; false when it was itself preempted.

        Only a decoding sequence can lack any (a prompt gets all of its blocks when admitted),
        and the victim is the last by rank, so no victim has a chunk in this iteration already.
        """
        if sequence not in self.running:
            return False
        missing = self._num_blocks(num_tokens) - len(sequence.blocks)
        while self.pool.num_free < missing:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        sequence.blocks += self.pool.allocate(max(missing, 0))
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence to running if blocks for all its tokens are free."""
        shared: list[int] = []
        if self._shares(sequence):
            reusable = (len(sequence.token_ids) - 1) // self.block_size  # the last is computed
            shared = self.pool.find_prefix(self._hashes(sequence, reusable))
        missing = self._num_blocks(len(sequence.token_ids)) - len(shared)
        spare = 1 if self.running else 0  # room to decode, so that it is not preempted at once
        if self.pool.num_free_without(shared) < missing + spare:
            return False
        self.waiting.pop(0)
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(missing)
        sequence.num_remembered = len(shared)
        sequence.num_computed = len(shared) * self.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
        insort(self.running, sequence, key=_rank)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it keeps its rank and computes its tokens again."""
        self._drop(sequence)
        insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1

    def restart(self, sequence: Sequence, root_hash: BlockHash) -> None:
        """Let a running sequence compute all of its tokens again, under another root."""
        self._drop(sequence)
        sequence.hashes = []
        sequence.root_hash = root_hash
        insort(self.waiting, sequence, key=_rank)

    def _drop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_remembered = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[BlockHash]:
        """The hashes of the sequence's first `count` blocks, each computed once."""
        hashes, size = sequence.hashes, self.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size]))
        return hashes[:count]

    def _remember_full_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        full = num_tokens // self.block_size
        if full > sequence.num_remembered and self._shares(sequence):
            hashes = self._hashes(sequence, full)
            for i in range(sequence.num_remembered, full):
                self.pool.remember(sequence.blocks[i], hashes[i])
            sequence.num_remembered = full

    def settle(self, chunk: Chunk, token_id: int | None, stops: bool) -> FinishReason | None:
        """Record what an iteration did for a chunk; the reason if the sequence ended by it.

        token_id: what was sampled, None while the prompt is incomplete. stops: whether that
        token ends the sequence (it is then no part of the output).
        """
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        if token_id is None:
            return None
        if stops:
            reason = FinishReason.STOP
        else:
            sequence.token_ids.append(token_id)
            sampling = sequence.request.sampling
            full = len(sequence.token_ids) >= self.max_seq_len
            if sequence.num_generated < sampling.max_tokens and not full:
                return None
            reason = FinishReason.LENGTH
        self._drop(sequence)
        return reason

    def remove(self, sequence: Sequence) -> None:
        """Forget a cancelled sequence wherever it is."""
        if sequence in self.running:
            self._drop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
