"""A prompt's hidden states -> one vector, as they come in the chunks in which they are computed.

Knows no tensor and no model. Source: Sentence-BERT (Reimers and Gurevych, 2019), section 3, of mean
pooling; Matryoshka representations (Kusupati et al., 2022), section 3, of the first dimensions.
"""

from __future__ import annotations

import numpy as np

from enginehouse.runtime.request import Pooling, PoolingKind


class PooledPrompt:
    """One prompt of num_tokens on its way to its embedding."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._pooling = pooling
        self._num_tokens = num_tokens
        self._first = num_tokens - 1 if pooling.kind is PoolingKind.LAST else 0
        self._num_seen = self._first  # the positions before are not wanted, or were added
        self._total: np.ndarray | None = None

    @property
    def wants_all(self) -> bool:
        """Whether every token's hidden state is, and some of them are missing."""
        return self._first == 0 and self._num_seen < self._num_tokens

    def wanted(self, start: int, end: int) -> range:
        """Of the positions from start to before end, those whose hidden states are to be added."""
        return range(max(start, self._num_seen), min(end, self._num_tokens))

    def add(self, states: np.ndarray) -> None:
        """states: float32 [rows, hidden_size], of the next positions that are wanted.

        They are summed one by one, so that no sum depends on how the prompt was cut.
        """
        if self._total is None:
            self._total = np.zeros(states.shape[1])
        for state in states:
            self._total += state
        self._num_seen += len(states)

    @property
    def finite(self) -> bool:
        return self._total is None or bool(np.isfinite(self._total).all())

    def vector(self) -> np.ndarray:
        """float32 [dimensions], the lowest byte of each first, once every state was added. One of
        zeros stays as it is.
        """
        assert self._total is not None and self._num_seen == self._num_tokens
        kept = self._total[: self._pooling.dimensions] / (self._num_tokens - self._first)
        if self._pooling.normalize:
            kept = kept / (np.sqrt(np.square(kept).sum()) or 1.0)
        return kept.astype("<f4")
