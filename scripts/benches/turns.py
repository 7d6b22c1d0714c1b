"""The measuring itself: contenders take turns on the same prompts, in rounds.

Each figure is taken when the machine is quiet, if that comes in time, and again where it did not
stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benches import goals
from benches.contender import Contender, ContenderFailed, Recipe
from benches.figures import Figures, Sample, gaps, percentile
from benches.prompts import Prompts
from benches.quiet import LIMIT, Others, Patience

_BESIDE = 16  # sequences that run while a long prompt arrives, or while memory is looked at
_PREFILLS = 4
_TRIES = 3


class Sizes(NamedTuple):
    """Tokens: of a prompt and its answer; of the prompt whose first token is waited for; of the one
    that arrives late, once the others have `after`.
    """

    prompt: int = 100
    out: int = 128
    long: int = 512
    late: int = 2000
    after: int = 32


SMOKE = Sizes(60, 12, 96, 200, 4)  # shows that all of it works, and measures nothing


class Turns:
    """figures: what was found so far. quick_rounds: of contenders that no goal is about."""

    def __init__(
        self, prompts: Prompts, patience: Patience, rounds: int, quick_rounds: int, sizes: Sizes
    ) -> None:
        self.figures = Figures()
        self._prompts = prompts
        self._patience = patience
        self._sizes = sizes
        self._rounds = rounds
        self._quick_rounds = quick_rounds

    def starts(self, recipes: Sequence[Recipe], log: Path) -> None:
        """Time to readiness, and in the first start of each the memory under load."""
        for turn in range(self._rounds):
            for recipe in recipes:
                if turn and not recipe.goals:
                    continue
                self._patience.wait()
                try:
                    with Others() as others, Contender(recipe, log / f"{recipe.name}.log") as one:
                        ready_s = one.ready_s
                        if turn == 0:
                            work = self._prompts.make(_BESIDE, self._sizes.prompt)
                            _, most = one.weigh("run", prompts=work, tokens=self._sizes.out)
                            self._add(goals.MEMORY, recipe.name, most / 2**20, 0.0)
                except ContenderFailed as error:
                    print(f"  {error}", flush=True)
                    continue
                self._add(goals.READY, recipe.name, ready_s, others.share)
            self._tell(f"start {turn + 1}", goals.READY, recipes)
        self._tell("most", goals.MEMORY, recipes)

    def rounds(self, contenders: Sequence[Contender], loads: Sequence[int]) -> None:
        for contender in contenders:
            contender.ask("run", prompts=self._prompts.make(4, self._sizes.prompt), tokens=8)
        for turn in range(self._rounds):
            at = turn % len(contenders)
            order = [*contenders[at:], *contenders[:at]]
            if turn >= self._quick_rounds:
                order = [one for one in order if one.has_goals]
            for load in loads:
                work = self._prompts.make(load, self._sizes.prompt)
                rate = _rate(load * self._sizes.out)
                self._each(order, goals.THROUGHPUT.format(load), "run", rate, work, self._sizes.out)
                self._tell(f"round {turn + 1}", goals.THROUGHPUT.format(load), order)
            work = self._prompts.make(1, self._sizes.long)
            self._each(order, goals.TTFT, "run", lambda told: 1e3 * told["wall_s"], work, 1)
            self._tell(f"round {turn + 1}", goals.TTFT, order)
            work = self._prompts.make(_PREFILLS, self._sizes.long)
            self._each(order, goals.PREFILL, "run", _rate(_PREFILLS * self._sizes.long), work, 1)
            self._tell(f"round {turn + 1}", goals.PREFILL, order)
            self._late_prompt(order)
            self._tell(f"round {turn + 1}", goals.LATE_GAP, order)

    def _late_prompt(self, order: Sequence[Contender]) -> None:
        work, [late] = (
            self._prompts.make(_BESIDE, self._sizes.prompt),
            self._prompts.make(1, self._sizes.late),
        )
        asked = {"tokens": self._sizes.out, "after": self._sizes.after}
        for one in order:
            if "steps" not in one.operations:
                continue
            told, busy = self._quietly(one, "steps", prompts=work, late=late, **asked)
            if told is not None:
                begin, end = told["late"]
                median = percentile(gaps(told["times"]), 0.5)
                worst = percentile(gaps(told["times"], begin, end), 0.99)
                self._add(goals.GAP, one.name, 1e3 * median, busy)
                self._add(goals.LATE_GAP, one.name, 1e3 * worst, busy)

    def _each(
        self,
        order: Sequence[Contender],
        what: str,
        op: str,
        value: Callable[[dict[str, Any]], float],
        prompts: list[dict[str, Any]],
        tokens: int,
    ) -> None:
        for one in order:
            told, busy = self._quietly(one, op, prompts=prompts, tokens=tokens)
            if told is not None:
                self._add(what, one.name, value(told), busy)

    def _quietly(
        self, one: Contender, op: str, **asked: Any
    ) -> tuple[dict[str, Any] | None, float]:
        """What it tells, and others' share; None where it could not."""
        told: dict[str, Any] | None = None
        for _ in range(_TRIES):
            self._patience.wait()
            try:
                with Others(one.pids) as others:
                    told = one.ask(op, **asked)
            except ContenderFailed as error:
                print(f"  {error}", flush=True)
                return None, 0.0
            if others.share <= LIMIT or self._patience.left <= 0:
                break
            self._patience.left -= others.wall_s
        return told, others.share

    def _add(self, what: str, who: str, value: float, busy: float) -> None:
        self.figures.add(what, who, Sample(value, busy))

    def _tell(self, when: str, what: str, order: Sequence[Recipe | Contender]) -> None:
        cells = []
        for one in sorted(order, key=lambda one: one.name):
            samples = self.figures.of(what, one.name)
            if samples:
                value, busy = samples[-1]
                cells.append(f"{one.name} {goals.number(value)}" + _noise(busy))
        print(f"{when}, {what}: {', '.join(cells)}", flush=True)


def _noise(busy: float) -> str:
    return f" (others {busy:.0%})" if busy > LIMIT else ""


def _rate(amount: float) -> Callable[[dict[str, Any]], float]:
    return lambda told: amount / told["wall_s"]
