"""Token ids -> chained hashes of their blocks: two prompts that begin alike have them in common.

A hash stands for everything up to its block's end. Knows no replica.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

_ID_BYTES = array("I").itemsize
_ROOT = 0


class PrefixBlocks:
    """What begins a prompt, block by block.

    prompt_ids: non-negative and below 2**32; those beyond max_blocks blocks are not looked at.
    """

    def __init__(self, prompt_ids: Sequence[int], block_tokens: int, max_blocks: int) -> None:
        self._data = memoryview(array("I", prompt_ids[: block_tokens * max_blocks]).tobytes())
        self._block_bytes = block_tokens * _ID_BYTES
        self.block_tokens = block_tokens
        self.num_tokens = len(self._data) // _ID_BYTES
        self.hashes: list[int] = []  # of each full block
        self._partial: dict[int, list[tuple[int, int]]] = {}
        seed = _ROOT
        for start in range(0, len(self._data) - self._block_bytes + 1, self._block_bytes):
            seed = xxh3_64_intdigest(self._data[start : start + self._block_bytes], seed)
            self.hashes.append(seed)

    def parent(self, depth: int) -> int:
        """The hash that stands for the first `depth` blocks."""
        return self.hashes[depth - 1] if depth else _ROOT

    def partial(self, depth: int) -> list[tuple[int, int]]:
        """(tokens, hash) of each part of the block behind the first `depth`, the longest first.

        A prompt's last block is seldom full; the conversation's next prompt goes on inside it.
        """
        found = self._partial.get(depth)
        if found is None:  # every replica asks for few and the same
            start, seed = depth * self._block_bytes, self.parent(depth)
            most = min(self.block_tokens - 1, self.num_tokens - depth * self.block_tokens)
            ends = ((n, start + n * _ID_BYTES) for n in range(most, 0, -1))
            found = [(n, xxh3_64_intdigest(self._data[start:end], seed)) for n, end in ends]
            self._partial[depth] = found
        return found

    def last(self) -> int | None:
        """The hash of the last block where it is not full; None: it is, or there is none."""
        return next((found for _, found in self.partial(len(self.hashes))), None)
