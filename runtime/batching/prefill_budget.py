"""How many tokens of prompts an iteration takes beside sequences that are being answered.

What an iteration takes is learnt from those that were: a part of its own, and one for each sequence
that decodes and each token of a prompt. Knows no sequence and no clock.
"""

from __future__ import annotations

import math

_LEAST = 8  # tokens, so that prompts get on whatever was measured
_SHARE = 0.75  # of what the iteration takes without prompts
_FIRST = (7.0, 1.0, 0.7)  # how the parts begin, in proportion: a small model's on a CPU
# Of logarithms: the scatter of what is measured, by how much parts may change in an iteration, and
# how little is known of them at first, of each and of all together; and the most that one counts.
_SCATTER, _DRIFT, _DOUBT, _ALL = 0.15**2, 0.03**2, 1.0, 1000.0
_SURPRISE = 0.7


class PrefillBudget:
    """Keeps running estimates of the three parts, in seconds.

    prompts_ms: what prompts may add to an iteration; None: three quarters of what it takes without.
    """

    def __init__(self, prompts_ms: float | None = None) -> None:
        self._prompts_s = None if prompts_ms is None else prompts_ms / 1000
        self._parts = list(_FIRST)
        self._doubt = [[_ALL + _DOUBT * (i == j) for j in range(3)] for i in range(3)]

    def tokens(self, num_decodes: int) -> int:
        """Of prompts, in an iteration in which so many sequences decode."""
        own, decode, token = self._parts
        room = _SHARE * (own + decode * num_decodes)
        if self._prompts_s is not None:
            room = self._prompts_s
        return max(_LEAST, int(room / token))

    def share(self, num_decodes: int) -> float:
        """Of an iteration in which so many sequences decode, what is theirs: it grows with them."""
        own, decode, _ = self._parts
        return decode * num_decodes / (own + decode * num_decodes)

    def learn(self, seconds: float, num_decodes: int, num_tokens: int) -> None:
        """What an iteration took, and of how many decodes and tokens of prompts. A drafted token is
        a decode: it takes as much.

        A Kalman filter of the parts' logarithms: each answers for what was wrong by its share and
        by how little is known of it. Plain numbers, as an iteration may take but 3 ms.
        """
        own, decode, token = self._parts
        foreseen = (own, decode * num_decodes, token * num_tokens)
        whole = sum(foreseen)
        a, b, c = (part / whole for part in foreseen)
        known = [x * a + y * b + z * c for x, y, z in self._doubt]
        doubt = known[0] * a + known[1] * b + known[2] * c
        wrong = math.log(seconds / whole)
        if doubt < _ALL / 2:
            wrong = min(max(wrong, -_SURPRISE), _SURPRISE)
        for i, row in enumerate(self._doubt):
            gain = known[i] / (doubt + _SCATTER)
            self._parts[i] *= math.exp(gain * wrong)
            for j in range(3):
                row[j] -= gain * known[j]
            if row[i] < _DOUBT:
                row[i] += _DRIFT
