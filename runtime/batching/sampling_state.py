"""What the choice of one sequence's next token depends on, besides its logits.

Ids and numbers only, in Python's and numpy's words: whoever chooses makes of them what it needs
(`sampling.py` tensors, `cpu/sampler.py` pointers). Knows no logits, no batch and no text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from enginehouse.runtime.request import SamplingParams, TokenLogprobs

T = TypeVar("T")

_GREEDY_BELOW = 1e-6  # a temperature so small that dividing by it says nothing


class Matcher(Protocol):
    """What a constraint allows next; its state is that of the text so far.

    failure: why it can be followed no further, if so.
    """

    failure: str | None

    def allowed(self) -> np.ndarray:
        """The tokens that may follow: int32 [words], of 32 tokens each, the first in the lowest
        bit. Of use until the next call.
        """

    def accept(self, token_id: int) -> None:
        """Go on behind a token that is `allowed`."""


class Sampled(NamedTuple):
    """A chosen token, -1 when there is none to choose, and its logprobs if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class TokenCounts:
    """Token ids, each once, and how often each was generated."""

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._places = {token: i for i, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array([*self._places, 0], dtype=np.int32)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.resize(self._ids, 2 * place)
            self._counts = np.concatenate([self._counts, np.zeros(place, dtype=np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """int32 [tokens]"""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """float32 [tokens]: 0 for what stands in the prompt only."""
        return self._counts[: len(self._places)]


class SamplingState:
    """One sequence's generator, the token counts its penalties need, and its constraint.

    eos_token_ids: of the engine. stop_ids: what ends this sequence. biased, biases: int32 and
    float32 [tokens]. counted: None where nothing is penalised. greedy: the likeliest token is
    chosen, and no number drawn. error: what this sequence's own part of a step raised; no token is
    chosen for it then.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_token_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.error: Exception | None = None
        self.num_generated = 0
        constrained = params.constraint is not None
        ends_by_eos = constrained or not params.ignore_eos
        self.stop_ids = {*params.stop_token_ids, *(eos_token_ids if ends_by_eos else ())}
        self._not_early = _ids({*params.stop_token_ids, *eos_token_ids})
        # The end of a constrained text is one, even where it is to be passed over.
        self._unwanted = _ids(eos_token_ids if constrained and params.ignore_eos else ())
        self.biased = np.array([i for i, _ in params.logit_bias], dtype=np.int32)
        self.biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self.random = random.Random(params.seed)  # None: seeded by the operating system
        # One candidate is no choice.
        one_left = params.top_k == 1 or params.min_p >= 1.0
        self.greedy = params.temperature < _GREEDY_BELOW or one_left
        self.filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self.counted: TokenCounts | None = None
        if params.repetition_penalty != 1.0:
            self.counted = TokenCounts(prompt_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counted = TokenCounts()

    @property
    def forbidden(self) -> np.ndarray:
        """int32 [tokens]: what may not be chosen now, unless a constraint leaves nothing else: one
        that is fulfilled allows only the end.
        """
        early = self.num_generated < self.params.min_tokens
        return self._not_early if early else self._unwanted

    def attempt(self, work: Callable[[T], None], part: T) -> None:
        """Do work that is this sequence's own: what it raises is no neighbour's business."""
        try:
            work(part)
        except Exception as error:  # of a grammar, of torch, of anything
            self.error = error

    def accept(self, token_id: int) -> None:
        """Count a token that was generated, and does not end the sequence."""
        self.num_generated += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self.counted is not None:
            self.counted.add(token_id)


def _ids(values: Iterable[int]) -> np.ndarray:
    return np.array(sorted(values), dtype=np.int32)
