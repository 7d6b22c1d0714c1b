"""Which tokens may follow, as grammars say it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bitmask(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """int32 [words]: a bit for each of these tokens, the first token's the lowest."""
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)
