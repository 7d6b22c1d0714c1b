"""Where one sequence is in its grammar: which tokens may follow, and going on by one.

Part of the sequence's sampling state: a preempted sequence keeps it. Knows no logits but a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import xgrammar
from torch import Tensor

from enginehouse.runtime.grammar.child import Compiled
from enginehouse.runtime.machine.device import to_device

# Processor seconds, in which the whole batch waits: at once, and for each token besides.
_MAX_S = 0.5
_MAX_S_PER_TOKEN = 0.01
# Where characters are counted: near a bound, tokens are tried one by one. Measured: up to 0.13 s
# for each of a string's last ten characters at a vocabulary of 131k (docs/measurements.md).
_MAX_S_PER_COUNTED_TOKEN = 0.15


def forbid(logits: Tensor, bitmask: Tensor) -> None:
    """Set the tokens whose bit is 0 to -inf, in place; bitmask: int32 [words of 32], on the CPU."""
    words = to_device(bitmask, logits.device)
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    logits.masked_fill_((bits & 1).flatten()[: len(logits)] == 0, float("-inf"))


class GrammarMatcher:
    """Satisfies `sampling.Matcher`. stop_ids: tokens that are allowed at the grammar's end only.

    failure: why the grammar can be followed no further, in words for its sender.
    """

    def __init__(self, compiled: Compiled, stop_ids: Iterable[int]) -> None:
        vocab_size = compiled.grammar.tokenizer_info.vocab_size
        self._matcher = xgrammar.GrammarMatcher(
            compiled.grammar, override_stop_tokens=sorted(stop_ids)
        )
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._s_per_token = _MAX_S_PER_COUNTED_TOKEN if compiled.counts else _MAX_S_PER_TOKEN
        self._allowed_s = _MAX_S
        self.failure: str | None = None

    def mask(self, logits: Tensor) -> None:
        began_s = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._bitmask)
        if logits.device.type == "cpu":
            xgrammar.apply_token_bitmask_inplace(logits[None], self._bitmask)
        else:
            forbid(logits, self._bitmask[0])
        if not self._bitmask.any():
            self.failure = (
                "no token can follow; change the constraint so that some text does, or leave out "
                "stop_token_ids that its text is made of"
            )
        self._spend(time.thread_time() - began_s)

    def accept(self, token_id: int) -> None:
        began_s = time.thread_time()
        if not self._matcher.accept_token(token_id):
            self.failure = "the constraint allowed a token and then refused it; change it"
        self._spend(time.thread_time() - began_s - self._s_per_token)

    def _spend(self, seconds: float) -> None:
        self._allowed_s -= seconds
        if self._allowed_s < 0:
            self.failure = "the constraint takes too long to follow; make it less ambiguous"
