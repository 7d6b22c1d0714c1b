"""Guesses at a sequence's next tokens: what followed its last tokens when they were there before.

Knows token ids; not who checks the guesses, nor what a check costs.
Source: prompt lookup decoding (Saxena, 2023); what a draft is worth: Leviathan et al. (2023).
"""

from __future__ import annotations

from typing import NamedTuple

from enginehouse.runtime.executor import ExecutorOptions

_SHORTEST = 2  # last tokens that are looked for, where so many may be
_CHANCE = 0.3  # of a guess, before any is known to be right or wrong
_MEMORY = 0.8  # how much of the estimate one guess leaves


class Speculation(NamedTuple):
    """num_tokens: of a draft, at most. ngram_size: last tokens that are looked for, at most.
    batch_size: sequences beside each other beyond which nothing is drafted.
    """

    num_tokens: int = 5
    ngram_size: int = 3
    batch_size: int = 1


def speculation_of(options: ExecutorOptions) -> Speculation | None:
    """What is asked for, else as above; None where it is off."""
    if options.speculative == "off":
        return None
    usual = Speculation()
    return Speculation(
        options.num_speculative_tokens or usual.num_tokens,
        options.max_matching_ngram_size or usual.ngram_size,
        options.speculative_batch_size or usual.batch_size,
    )


class Lookup:
    """Of one sequence: where its runs of tokens were last, and how often what followed came again.

    Each guess is held against the token that came, drafted or not: so drafts end and begin again
    by themselves, and to find out costs nothing.
    """

    def __init__(self, ngram_size: int) -> None:
        self._sizes = range(ngram_size, min(_SHORTEST, ngram_size) - 1, -1)
        self._chance = _CHANCE  # of a token, when those before it came as guessed
        self._guess: list[int] = []  # of the tokens behind those that were read
        self._num_read = 0
        self._ends: dict[tuple[int, ...], int] = {}  # a run of tokens -> what follows it begins

    def draft(self, token_ids: list[int], most: int, least_chance: float) -> list[int]:
        """At most so many tokens, each of which is the next one by at least this chance."""
        self._learn(token_ids)
        self._read(token_ids)
        self._guess = self._found(token_ids, most) if most > 0 else []
        count, chance = 0, self._chance
        while count < len(self._guess) and chance >= least_chance:
            count += 1
            chance *= self._chance
        return self._guess[:count]

    def _learn(self, token_ids: list[int]) -> None:
        """Of the guess, what came, up to the first token that did not."""
        for guessed, token in zip(self._guess, token_ids[self._num_read :], strict=False):
            self._chance += (1 - _MEMORY) * ((guessed == token) - self._chance)
            if guessed != token:
                break

    def _read(self, token_ids: list[int]) -> None:
        """All runs but those that end with the last token: nothing follows them yet."""
        for end in range(max(1, self._num_read), len(token_ids)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._num_read = len(token_ids)

    def _found(self, token_ids: list[int], most: int) -> list[int]:
        for size in self._sizes:
            end = self._ends.get(tuple(token_ids[-size:]))
            if end is not None:
                return token_ids[end : end + most]
        return []
