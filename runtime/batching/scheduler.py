"""In-flight batching: which sequence computes how many tokens in the next iteration.

Admits, chunks, decodes and preempts. It knows token ids; it knows neither tensors nor logits, and
where keys and values are kept, and how many fit, is the memory's.
Source: Orca (Yu et al., 2022), section 4.1; chunked prefill as in Sarathi (Agrawal et al., 2023).
"""

from __future__ import annotations

import time
from bisect import insort
from typing import Protocol

from enginehouse.runtime.batching.drafts import Lookup, Speculation
from enginehouse.runtime.batching.kv_cache import BlockHash
from enginehouse.runtime.batching.prefill_budget import PrefillBudget
from enginehouse.runtime.batching.sequence import Chunk, Sequence
from enginehouse.runtime.request import FinishReason

_FIXED_CHUNK = 128
_MARGIN = 1.25  # by which a draft must be worth more than it takes: its chance is an estimate


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class KVMemory(Protocol):
    """Room for keys and values: who has how much of it, and what of theirs is there already.

    Counted in blocks of block_size tokens; what nobody holds is free, though it may be remembered.
    """

    num_blocks: int
    block_size: int

    @property
    def num_free(self) -> int: ...

    @property
    def num_remembered(self) -> int:
        """Of the free ones, those that keep what a later sequence may share."""

    def states(self, most: int) -> bytes | None:
        """ExecutorStats' map of blocks, of `most` of them; None where it is not known."""

    def admit(self, sequence: Sequence, others: bool) -> int | None:
        """Give a waiting sequence room for all its tokens: how many of them need not be computed,
        or None when there is no room. others: some are running, and will want more.
        """

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for so many tokens of a running sequence; false when there is none."""

    def will_hold(self, sequence: Sequence, num_tokens: int) -> None:
        """The coming iteration computes the sequence's tokens up to num_tokens."""

    def release(self, sequence: Sequence) -> None:
        """Take back all of a sequence's room; num_computed still says what it holds."""


class Scheduler:
    """Owns the waiting and the running sequences.

    max_batch_size: sequences that run at once. max_num_tokens: tokens of one iteration, which
    bounds how long a prompt can hold up running streams. max_scored_tokens: of one prompt in an
    iteration, while its log probabilities are wanted. max_seq_len: prompt plus output.

    deterministic: how a sequence is cut into chunks depends on its own prompt alone.
    prefill: bounds the prompts' tokens of an iteration in which something decodes; not those of a
    deterministic one, nor of one in which nothing does. speculation: how tokens are drafted,
    by what prefill has learnt that they cost.
    """

    def __init__(
        self,
        memory: KVMemory,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        max_scored_tokens: int | None = None,
        deterministic: bool = False,
        prefill: PrefillBudget | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        assert memory.num_blocks * memory.block_size >= max_seq_len, "one sequence must always fit"
        assert max_num_tokens >= max_batch_size, "every running sequence must be able to decode"
        self.memory = memory
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.max_scored_tokens = max_scored_tokens or max_num_tokens
        self.max_seq_len = max_seq_len
        self.deterministic = deterministic
        self.prefill = prefill
        self.speculation = speculation
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
        """The next iteration: every decode, then chunks of prompts, by rank. Those that give way
        keep their room meanwhile, as long as nobody else needs it.

        Room for what is computed is held when this returns.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_tokens
        gives_way = self._someone_comes_first()
        turn = [s for s in self.running if not (gives_way and s.gives_way)]
        decoding = [s for s in turn if s.num_pending == 1]
        prefilling = [s for s in turn if s.num_pending > 1]
        if decoding and self.prefill is not None and not self.deterministic:
            budget = min(budget, len(decoding) + self.prefill.tokens(len(decoding)))
        for sequence in decoding + prefilling:
            count = self._num_next(sequence, budget)
            if count and self._make_room(sequence, sequence.num_computed + count):
                chunks.append(self._chunk(sequence, count))
                budget -= count
        while budget and self.waiting and not (gives_way and self.waiting[0].gives_way):
            sequence = self.waiting[0]
            if len(self.running) >= self.max_batch_size or not self._admit(sequence):
                if self.running and self.running[-1].gives_way and not sequence.gives_way:
                    self._preempt(self.running[-1])
                    continue
                break
            count = self._num_next(sequence, budget)
            if not count:
                break
            chunks.append(self._chunk(sequence, count))
            budget -= count
        if self.speculation and self.prefill and len(chunks) <= self.speculation.batch_size:
            return self._with_drafts(chunks, self.speculation, self.prefill)
        return chunks

    def _someone_comes_first(self) -> bool:
        return any(each and not each[0].gives_way for each in (self.running, self.waiting))

    def _with_drafts(
        self, chunks: list[Chunk], speculation: Speculation, prefill: PrefillBudget
    ) -> list[Chunk]:
        """Where all of them decode: as many guesses as are worth their rows.

        A kept guess saves its sequence's part of an iteration, 1/n of it; a row costs so much of
        one that n of them make the decodes' share: so a guess is worth it when its chance is
        larger than that. What drafts fill is not told to the memory before it is kept.
        """
        if any(chunk.sequence.num_pending > 1 for chunk in chunks):
            return chunks
        least_chance = _MARGIN * prefill.share(len(chunks))
        spare = self.max_num_tokens - len(chunks)
        drafted = []
        for chunk in chunks:
            sequence, num_tokens = chunk.sequence, len(chunk.sequence.token_ids)
            if sequence.lookup is None:
                sequence.lookup = Lookup(speculation.ngram_size)
            # A block for the next token of each comes first.
            blocks = self.memory.num_free - len(self.running)
            most = min(
                *(speculation.num_tokens, spare, blocks * self.memory.block_size),
                sequence.request.sampling.max_tokens - sequence.num_generated - 1,
                self.max_seq_len - num_tokens - 1,
            )
            draft = sequence.lookup.draft(sequence.token_ids, most, least_chance)
            if draft:
                grown = self.memory.grow(sequence, num_tokens + len(draft))
                assert grown, "as many blocks are free"
            spare -= len(draft)
            drafted.append(chunk._replace(draft=tuple(draft)))
        return drafted

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        """How many tokens to compute next.

        When deterministic: the prompt in pieces that begin at multiples of a fixed size, and
        every generated token by itself, as it was when it was generated.
        """
        most = self.max_scored_tokens if sequence.num_unscored else self.max_num_tokens
        if not self.deterministic:
            return min(sequence.num_pending, budget, most)
        left = len(sequence.request.prompt_ids) - sequence.num_computed
        size = self._fixed_chunk
        count = min(left, size - sequence.num_computed % size) if left > 0 else 1
        count = min(count, most)
        return count if count <= budget else 0

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        chunk = Chunk(sequence, sequence.num_computed, count)
        self.memory.will_hold(sequence, chunk.start + count)
        return chunk

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for `num_tokens` of a running sequence; false when it was itself preempted.

        Only a decoding sequence can lack any (a prompt gets all of its room when admitted),
        and the victim is the last by rank, so no victim has a chunk in this iteration already.
        """
        if sequence not in self.running:
            return False
        while not self.memory.grow(sequence, num_tokens):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence to running if there is room for all its tokens."""
        known = self.memory.admit(sequence, others=bool(self.running))
        if known is None:
            return False
        self.waiting.pop(0)
        sequence.num_computed = known
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = known
            sequence.queued_s = time.monotonic() - sequence.arrived_s
        insort(self.running, sequence, key=_rank)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's room; it keeps its rank and computes its tokens again."""
        self._drop(sequence)
        insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1

    def preempted(self) -> tuple[int, ...]:
        """Ids of those that wait and have run before."""
        known = [s for s in self.waiting if s.num_cached_tokens is not None]
        return tuple(sequence.request.request_id for sequence in known)

    def restart(self, sequence: Sequence, root_hash: BlockHash) -> None:
        """Let a running sequence compute all of its tokens again, under another root."""
        self._drop(sequence)
        sequence.hashes = []
        sequence.root_hash = root_hash
        insort(self.waiting, sequence, key=_rank)

    def _drop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.memory.release(sequence)
        sequence.num_computed = 0

    def settle(self, chunk: Chunk, token_id: int | None, stops: bool) -> FinishReason | None:
        """Record what an iteration did for a chunk; the reason if the sequence ended by it.

        token_id: what was sampled, None while the prompt is incomplete and where nothing is to be
        generated. stops: whether that token ends the sequence (it is then no part of the output).
        """
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        if token_id is None:
            if not chunk.completes:
                return None
            reason = FinishReason.LENGTH
        elif stops:
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
