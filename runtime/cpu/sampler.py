"""An iteration's logits in the compiled library: tokens are chosen, and log probabilities told.

native/sampling.h does it, one call for all rows; here is what it is told of each. Knows no weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int, c_void_p

import numpy as np

from enginehouse.runtime.batching.sampling_state import Sampled, SamplingState
from enginehouse.runtime.batching.sequence import ScoredRow
from enginehouse.runtime.cpu.library import NativeModel
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.request import TokenLogprobs


class Told(ctypes.Structure):
    """native/sampling.h's Told."""

    _fields_ = [
        *((name, c_void_p) for name in ("ids", "values")),
        *((name, c_int) for name in ("token", "count", "rank")),
        ("logprob", c_float),
    ]


_ARRAYS = ("allowed", "biased", "biases", "counted", "counts", "forbidden")
_SIZES = ("row", "num_biased", "num_counted", "num_forbidden", "top_k", "draws", "tells")


class Choice(ctypes.Structure):
    """native/sampling.h's Choice."""

    _fields_ = [
        *((name, c_void_p) for name in _ARRAYS),
        *((name, c_double) for name in ("number", "min_p", "top_p")),
        *((name, c_int) for name in _SIZES),
        *((name, c_float) for name in ("temperature", "repetition", "frequency", "presence")),
        ("token", c_int),
        ("told", Told),
    ]


class NativeLogits:
    """Satisfies `batching.model_runner.Logits`: the last `logits` of a model, which holds them."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model

    def sample(self, rows: Sequence[int], states: Sequence[SamplingState]) -> list[Sampled]:
        choices: list[Choice] = []
        asked: list[SamplingState] = []
        for row, state in zip(rows, states, strict=True):
            choice = Choice(row=row)
            state.attempt(lambda of_row: self._describe(*of_row), (choice, state))
            if state.error is None:
                choices.append(choice)
                asked.append(state)
        counts = [state.params.num_logprobs or 0 for state in asked]
        together = (Choice * len(choices))(*choices)
        room = _Room([choice.told for choice in together], counts, self._model.vocab_size)
        self._model.sample(together, [choice.row for choice in together])
        found = {}
        for i, (state, choice) in enumerate(zip(asked, together, strict=True)):
            told = room.read(i) if choice.tells and choice.token >= 0 else None
            found[id(state)] = Sampled(choice.token, told)
        return [found.get(id(state), Sampled(-1)) for state in states]

    def score(self, rows: Sequence[ScoredRow]) -> list[TokenLogprobs | None]:
        counts = [row.sequence.request.sampling.num_prompt_logprobs or 0 for row in rows]
        tolds = (Told * len(rows))(*(Told(token=row.next_token) for row in rows))
        room = _Room(list(tolds), counts, self._model.vocab_size)
        self._model.score(tolds)
        return [room.read(i) for i in range(len(rows))]

    def _describe(self, choice: Choice, state: SamplingState) -> None:
        """Its arrays stay the state's, until the token is accepted."""
        params = state.params
        if state.matcher is not None:
            words = state.matcher.allowed()
            assert words.dtype == np.int32 and 32 * len(words) >= self._model.vocab_size
            choice.allowed = words.ctypes.data
        if len(state.biased):
            choice.biased, choice.num_biased = self._ids(state.biased)
            choice.biases = state.biases.ctypes.data
        if state.counted is not None:
            choice.counted, choice.num_counted = self._ids(state.counted.ids)
            choice.counts = state.counted.counts.ctypes.data
            choice.repetition = params.repetition_penalty
            choice.frequency = params.frequency_penalty
            choice.presence = params.presence_penalty
        choice.forbidden, choice.num_forbidden = self._ids(state.forbidden)
        choice.tells = params.num_logprobs is not None
        choice.draws = not state.greedy
        if not state.greedy:
            choice.number = state.random.random()
            choice.temperature = params.temperature
            choice.top_k = min(params.top_k, self._model.vocab_size)
            choice.top_p, choice.min_p = params.top_p, params.min_p

    def _ids(self, ids: np.ndarray) -> tuple[int, int]:
        """Where they are, and how many; EngineError for one that is not of the vocabulary."""
        if not len(ids):
            return 0, 0
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < self._model.vocab_size:
            raise EngineError(
                f"tokens {low} to {high} are named; wanted some of 0 to "
                f"{self._model.vocab_size - 1}: mend the engine's end-of-sequence tokens"
            )
        return ids.ctypes.data, len(ids)


class _Room:
    """Where the likeliest tokens of some rows are told, [rows, most]."""

    def __init__(self, tolds: Sequence[Told], counts: Sequence[int], vocab_size: int) -> None:
        self._tolds = tolds
        most = min(max(counts, default=0), vocab_size)
        self._ids = np.empty((len(tolds), most), dtype=np.int32)
        self._values = np.empty((len(tolds), most), dtype=np.float32)
        if not most:
            return
        ids, values = self._ids.ctypes.data, self._values.ctypes.data
        for i, (told, count) in enumerate(zip(tolds, counts, strict=True)):
            told.count = min(count, most)
            told.ids, told.values = ids + i * most * 4, values + i * most * 4

    def read(self, i: int) -> TokenLogprobs:
        told = self._tolds[i]
        ids, values = self._ids[i, : told.count], self._values[i, : told.count]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(told.logprob, top, told.rank)
