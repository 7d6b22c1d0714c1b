"""Which KV block belongs to whom: allocate, share a prefix, evict. Ids only, no tensor.

A full block is known by the hash of its tokens and of everything before them, so equal
prefixes find each other. A block that nobody holds stays findable until it is needed.
Source: PagedAttention (Kwon et al., 2023), section 4.3-4.4; hash chain as in vLLM.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NewType

BlockHash = NewType("BlockHash", bytes)
ROOT_HASH = BlockHash(b"")
LONG_ROOT_HASH = BlockHash(b"long")  # the same tokens after it have other keys


def hash_block(parent: BlockHash, token_ids: Iterable[int]) -> BlockHash:
    """The name of a full block after `parent`; 16 bytes, so that collisions do not happen."""
    return BlockHash(blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest())


class BlockPool:
    """Owns every block's reference count, hash and place in the order of eviction.

    `_free` is ordered: next to be evicted first. A dict rather than a deque, because a prefix
    hit takes a block out of its middle.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_held_hashes = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, remembered ones included."""
        return len(self._free)

    @property
    def num_remembered(self) -> int:
        """Blocks nobody holds that can still be found."""
        return len(self._by_hash) - self._num_held_hashes

    def states(self, most: int) -> bytes:
        """ExecutorStats' map: each block's state, or that of `most` of them, evenly."""
        count = min(self.num_blocks, most)
        blocks = [index * self.num_blocks // count for index in range(count)]
        return bytes(map(self._state, blocks))

    def _state(self, block: int) -> int:
        held = self._references[block]
        return min(held + 1, 3) if held else int(self._hashes[block] is not None)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `num_free`."""
        assert count <= len(self._free)
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        old = self._hashes[block]
        if old is not None:
            del self._by_hash[old]
            self._hashes[block] = None
        self._references[block] = 1
        return block

    def find_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest known prefix; nothing is taken yet."""
        found = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Free blocks that remain once `blocks` are shared."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find_prefix` gave."""
        for block in blocks:
            self._references[block] += 1
            if block in self._free:
                del self._free[block]
                self._num_held_hashes += 1

    def remember(self, block: int, block_hash: BlockHash) -> None:
        """Let a full block that is held be found by its hash; the first of two equal ones wins."""
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block
            self._num_held_hashes += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks. Its tail is evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:  # nobody can find it: use it first
                    self._free.move_to_end(block, last=False)
                else:
                    self._num_held_hashes -= 1
