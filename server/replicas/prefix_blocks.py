"""Token ids -> chained hashes of their blocks: two prompts that begin alike have them in common.

A hash stands for everything up to its block's end. Knows no replica.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

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
        seed = _ROOT
        for start in range(0, len(self._data) - self._block_bytes + 1, self._block_bytes):
            seed = xxh3_64_intdigest(self._data[start : start + self._block_bytes], seed)
            self.hashes.append(seed)

    def parent(self, depth: int) -> int:
        """The hash that stands for the first `depth` blocks."""
        return self.hashes[depth - 1] if depth else _ROOT

    def partial(self, depth: int) -> Iterator[tuple[int, int]]:
        """(tokens, hash) of each part of the block behind the first `depth`, the longest first.

        A prompt's last block is seldom full; the conversation's next prompt goes on inside it.
        """
        start, seed = depth * self._block_bytes, self.parent(depth)
        for num_tokens in range(min(self.block_tokens - 1, self._behind(depth)), 0, -1):
            end = start + num_tokens * _ID_BYTES
            yield num_tokens, xxh3_64_intdigest(self._data[start:end], seed)

    def last(self) -> int | None:
        """The hash of the last block where it is not full; None: it is, or there is none."""
        return next((found for _, found in self.partial(len(self.hashes))), None)

    def _behind(self, depth: int) -> int:
        """Tokens behind the first `depth` blocks."""
        return self.num_tokens - depth * self.block_tokens
