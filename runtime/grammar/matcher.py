"""Where one sequence is in its grammar: which tokens may follow, and going on by one.

Part of the sequence's sampling state: a preempted sequence keeps it. Knows no logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import xgrammar

from enginehouse.runtime.grammar.child import Compiled

# Processor seconds, in which the whole batch waits: at once, and for each token besides.
_MAX_S = 0.5
_MAX_S_PER_TOKEN = 0.01
# Where characters are counted: near a bound, tokens are tried one by one. Measured: up to 0.13 s
# for each of a string's last ten characters at a vocabulary of 131k (docs/measurements.md).
_MAX_S_PER_COUNTED_TOKEN = 0.15


class GrammarMatcher:
    """Satisfies `sampling_state.Matcher`. stop_ids: tokens that are allowed at its end only.

    failure: why the grammar can be followed no further, in words for its sender.
    """

    def __init__(self, compiled: Compiled, stop_ids: Iterable[int]) -> None:
        vocab_size = compiled.grammar.tokenizer_info.vocab_size
        self._matcher = xgrammar.GrammarMatcher(
            compiled.grammar, override_stop_tokens=sorted(stop_ids)
        )
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._words: np.ndarray = self._bitmask[0].numpy()
        self._s_per_token = _MAX_S_PER_COUNTED_TOKEN if compiled.counts else _MAX_S_PER_TOKEN
        self._allowed_s = _MAX_S
        self.failure: str | None = None

    def allowed(self) -> np.ndarray:
        began_s = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._bitmask)
        if not self._words.any():
            self.failure = (
                "no token can follow; change the constraint so that some text does, or leave out "
                "stop_token_ids that its text is made of"
            )
        self._spend(time.thread_time() - began_s)
        return self._words

    def accept(self, token_id: int) -> None:
        began_s = time.thread_time()
        if not self._matcher.accept_token(token_id):
            self.failure = "the constraint allowed a token and then refused it; change it"
        self._spend(time.thread_time() - began_s - self._s_per_token)

    def _spend(self, seconds: float) -> None:
        self._allowed_s -= seconds
        if self._allowed_s < 0:
            self.failure = "the constraint takes too long to follow; make it less ambiguous"
