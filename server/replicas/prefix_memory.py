"""Which beginnings of prompts a replica has computed, and which ones many conversations share.

Bounded: what was used longest ago is forgotten first, and a block never before those that go on
from it. Does not choose.
"""

from __future__ import annotations

from collections import OrderedDict

from enginehouse.server.replicas.prefix_blocks import PrefixBlocks


class PrefixMemory:
    """What one replica was sent. max_blocks: as many as its KV cache holds, or fewer."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def num_matched(self, blocks: PrefixBlocks) -> int:
        """Tokens at the start of a prompt that were in one before it: in full blocks, and in the
        part of the next one that ended an earlier prompt.
        """
        depth = 0
        while depth < len(blocks.hashes) and blocks.hashes[depth] in self._seen:
            depth += 1
        if not depth and not self._seen:
            return 0
        behind = (tokens for tokens, found in blocks.partial(depth) if found in self._seen)
        return depth * blocks.block_tokens + next(behind, 0)

    def remember(self, blocks: PrefixBlocks) -> None:
        """The last block first, so that it is the oldest of them."""
        last = blocks.last()
        for found in (*(() if last is None else (last,)), *reversed(blocks.hashes)):
            self._seen[found] = None
            self._seen.move_to_end(found)
        while len(self._seen) > self._max_blocks:
            self._seen.popitem(last=False)


class SharedPrefixes:
    """How many ways on there were from a block: from a system prompt many, from a conversation one,
    or a few where answers were made again.
    """

    def __init__(self, max_blocks: int, min_ways: int) -> None:
        self._max_blocks, self._min_ways = max_blocks, min_ways
        self._ways: OrderedDict[int, set[int]] = OrderedDict()

    def depth(self, blocks: PrefixBlocks) -> int:
        """Blocks at the start of a prompt that are no conversation's own."""
        depth = len(blocks.hashes)
        while depth and len(self._ways.get(blocks.parent(depth), ())) < self._min_ways:
            depth -= 1
        return depth

    def remember(self, blocks: PrefixBlocks) -> None:
        last = blocks.last()
        ways = [*blocks.hashes, *(() if last is None else (last,))]
        for depth in reversed(range(len(ways))):
            parent = blocks.parent(depth)
            found = self._ways.setdefault(parent, set())
            if len(found) < self._min_ways:
                found.add(ways[depth])
            self._ways.move_to_end(parent)
        while len(self._ways) > self._max_blocks:
            self._ways.popitem(last=False)
