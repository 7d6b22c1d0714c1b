"""Which slot of a TensorRT cache belongs to whom, and what the others still hold.

A slot is a row of one buffer for each layer and side, [slots, kv_heads, S, head_size]; S is a
plan's context, so that each plan has a pool of its own. A sequence has one slot from its admission
to its end, in the smallest context that its prompt and max_tokens fit. What a finished sequence
leaves is kept until its slot is needed, the least recently used first: a prompt that begins alike
copies it.

Satisfies `scheduler.KVMemory`. Knows no tensor: it says which rows to copy, and in which order.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import NamedTuple

from enginehouse.runtime.batching.kv_cache import ROOT_HASH, BlockHash
from enginehouse.runtime.batching.sequence import Sequence
from enginehouse.runtime.tensorrt.commands import ClearSlot, CopyRows, Move, SwapRows

_LEAST_SHARED = 16  # tokens: fewer are computed about as fast as they are copied


def batch_bucket(count: int, limit: int) -> int:
    """How many slots a step takes for `count`: a power of two, at most `limit`."""
    return min(limit, 1 << (count - 1).bit_length())


class Place(NamedTuple):
    """A slot of a plan's pool."""

    plan: int
    slot: int


class _Slot:
    """What a slot holds: a sequence's rows, or those that an earlier one left."""

    def __init__(self) -> None:
        self.sequence: Sequence | None = None
        self.tokens: list[int] = []  # that were left
        self.root: BlockHash = ROOT_HASH
        self.last_used = 0

    @property
    def num_rows(self) -> int:
        """Rows that must not be lost; never all of a slot, as its last token is not computed."""
        return len(self.tokens) if self.sequence is None else self.sequence.num_computed


class SlotMemory:
    """Owns the slots of all plans.

    contexts: rows of each plan's slots, rising; counts: how many slots each has. shares: whether
    prefixes are reused at all; sequences with a seed never do, so that what happens to be kept
    cannot change their arithmetic.
    """

    def __init__(
        self, contexts: Several[int], counts: Several[int], max_seq_len: int, shares: bool = True
    ) -> None:
        assert counts[-1] > 0, "one sequence must always fit"
        self.contexts = tuple(contexts)
        self.num_blocks = sum(counts)
        self.block_size = self.contexts[-1]
        self._max_seq_len = max_seq_len
        self._shares_any = shares
        self._pools = [[_Slot() for _ in range(count)] for count in counts]
        self._places: dict[Sequence, Place] = {}
        self._moves: list[Move] = []
        self._clock = 0

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self._places)

    @property
    def num_remembered(self) -> int:
        slots = (slot for pool in self._pools for slot in pool)
        return sum(slot.sequence is None and bool(slot.tokens) for slot in slots)

    def place(self, sequence: Sequence) -> Place:
        return self._places[sequence]

    def num_slots(self, plan: int) -> int:
        return len(self._pools[plan])

    def num_rows(self, place: Place) -> int:
        """The first row of a slot that may be written over."""
        return self._slot(place).num_rows

    def states(self, most: int) -> None:
        """A slot has no blocks."""

    def admit(self, sequence: Sequence, others: bool) -> int | None:
        sampling = sequence.request.sampling
        longest = len(sequence.request.prompt_ids) + sampling.max_tokens
        plan = self._plan_with_room(min(longest, self._max_seq_len))
        if plan is None:
            return None
        source, count = self._longest_prefix(sequence)
        place = self._free_place(plan, source, count)
        slot = self._slot(place)
        if count and source is not None:
            self._touch(self._slot(source))
            if source != place:
                self._moves.append(CopyRows(*source, *place, count))
        slot.sequence, slot.tokens, slot.root = sequence, [], sequence.root_hash
        self._places[sequence] = place
        return count

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        return True  # its slot holds all it can ever have

    def will_hold(self, sequence: Sequence, num_tokens: int) -> None:
        pass  # only rows that were computed are copied

    def release(self, sequence: Sequence) -> None:
        place = self._places.pop(sequence)
        slot = self._slot(place)
        slot.sequence, slot.tokens = None, []
        if sequence.spoiled:
            self._moves.append(ClearSlot(*place))
        elif self._shares(sequence):
            slot.tokens = sequence.token_ids[: sequence.num_computed]
        self._touch(slot)

    def moves(self) -> list[Move]:
        """What must be done before the next step, in order: prefixes copied, and the sequences of
        a pool brought together where a smaller batch then takes them all.
        """
        for plan in range(len(self._pools)):
            self._compact(plan)
        moves, self._moves = self._moves, []
        return moves

    def _slot(self, place: Place) -> _Slot:
        return self._pools[place.plan][place.slot]

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock

    def _shares(self, sequence: Sequence) -> bool:
        return self._shares_any and sequence.request.sampling.seed is None

    def _plan_with_room(self, num_tokens: int) -> int | None:
        for plan, (context, pool) in enumerate(zip(self.contexts, self._pools, strict=True)):
            if context >= num_tokens and any(slot.sequence is None for slot in pool):
                return plan
        return None

    def _longest_prefix(self, sequence: Sequence) -> tuple[Place | None, int]:
        """The slot that begins as the sequence does for longest, and for how many tokens."""
        best: tuple[Place | None, int] = (None, 0)
        if not self._shares(sequence) or sequence.computes_all:
            return best
        wanted = sequence.token_ids[:-1]  # the last is computed
        for plan, pool in enumerate(self._pools):
            for index, slot in enumerate(pool):
                if slot.root != sequence.root_hash:
                    continue
                owner = slot.sequence
                if owner is not None and not self._shares(owner):
                    continue
                tokens = slot.tokens if owner is None else owner.token_ids
                count = _common(wanted, tokens, min(len(wanted), slot.num_rows))
                if count >= _LEAST_SHARED and count > best[1]:
                    best = Place(plan, index), count
        return best

    def _free_place(self, plan: int, source: Place | None, count: int) -> Place:
        """An empty slot, else the least recently used; the source itself if all of it is of use."""
        if source is not None and source.plan == plan:
            slot = self._slot(source)
            if slot.sequence is None and len(slot.tokens) == count:
                return source
        pool = self._pools[plan]
        free = [index for index, slot in enumerate(pool) if slot.sequence is None]
        return Place(plan, min(free, key=lambda i: (bool(pool[i].tokens), pool[i].last_used, i)))

    def _compact(self, plan: int) -> None:
        pool = self._pools[plan]
        busy = [index for index, slot in enumerate(pool) if slot.sequence is not None]
        while busy and batch_bucket(busy[-1] + 1, len(pool)) > batch_bucket(len(busy), len(pool)):
            last = busy.pop()
            hole = next(index for index, slot in enumerate(pool) if slot.sequence is None)
            kept, rows = pool[hole].num_rows, pool[last].num_rows
            if kept and rows:
                self._moves.append(SwapRows(plan, last, hole, max(kept, rows)))
            elif kept:
                self._moves.append(CopyRows(plan, hole, plan, last, kept))
            elif rows:
                self._moves.append(CopyRows(plan, last, plan, hole, rows))
            pool[hole], pool[last] = pool[last], pool[hole]
            owner = pool[hole].sequence
            assert owner is not None
            self._places[owner] = Place(plan, hole)
            busy = sorted([*busy, hole])


def _common(one: list[int], other: list[int], limit: int) -> int:
    """The length of the common beginning, at most limit; whole slices are compared, in C."""
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # equal up to low, different up to high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
