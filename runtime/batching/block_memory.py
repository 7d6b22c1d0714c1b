"""Sequences in paged blocks: which they hold, and which full ones they share.

Satisfies `scheduler.KVMemory`. Knows no tensor; the free list is the pool's.
"""

from __future__ import annotations

from enginehouse.runtime.batching.kv_cache import BlockHash, BlockPool, hash_block
from enginehouse.runtime.batching.sequence import Sequence


class BlockMemory:
    """Gives a pool's blocks, of block_size tokens each, to sequences.

    shares: whether sequences may share blocks at all. Those with a seed never do, so that what
    the cache happens to hold cannot change their arithmetic. num_slots: places for what a model
    keeps of a sequence beside blocks, at least one for each that runs; 0 where it keeps nothing.
    Where it does, no blocks are shared: nobody has what was kept behind them.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, shares: bool = True, num_slots: int = 0
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._has_slots = num_slots > 0
        self._free_slots = list(range(num_slots))
        self._shares_any = shares and not self._has_slots

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_remembered(self) -> int:
        return self.pool.num_remembered

    def states(self, most: int) -> bytes:
        return self.pool.states(most)

    def admit(self, sequence: Sequence, others: bool) -> int | None:
        shared: list[int] = []
        if self._shares(sequence) and not sequence.computes_all:
            reusable = (len(sequence.token_ids) - 1) // self.block_size  # the last is computed
            shared = self.pool.find_prefix(self._hashes(sequence, reusable))
        missing = self._count(len(sequence.token_ids)) - len(shared)
        spare = 1 if others else 0  # room to decode, so that it is not preempted at once
        if self.pool.num_free_without(shared) < missing + spare:
            return None
        if self._has_slots:
            sequence.slot = self._free_slots.pop()
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(missing)
        sequence.num_remembered = len(shared)
        return len(shared) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self._count(num_tokens) - len(sequence.blocks)
        if self.pool.num_free < missing:
            return False
        sequence.blocks += self.pool.allocate(max(missing, 0))
        return True

    def will_hold(self, sequence: Sequence, num_tokens: int) -> None:
        """Full blocks can be found at once: an iteration stores keys before it reads them, so a
        prefix can be shared within the very iteration that fills it.
        """
        full = num_tokens // self.block_size
        if full > sequence.num_remembered and self._shares(sequence):
            hashes = self._hashes(sequence, full)
            for i in range(sequence.num_remembered, full):
                self.pool.remember(sequence.blocks[i], hashes[i])
            sequence.num_remembered = full

    def release(self, sequence: Sequence) -> None:
        if self._has_slots and sequence.blocks:
            self._free_slots.append(sequence.slot)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_remembered = 0

    def _shares(self, sequence: Sequence) -> bool:
        return self._shares_any and sequence.request.sampling.seed is None

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _hashes(self, sequence: Sequence, count: int) -> list[BlockHash]:
        """The hashes of the sequence's first `count` blocks, each computed once."""
        hashes, size = sequence.hashes, self.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size]))
        return hashes[:count]
