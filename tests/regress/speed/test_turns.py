"""A B B A, never A and then B; and an end as soon as it is settled. Times are made up here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from enginehouse.regress.speed.metrics import STEP, TOKENS_PER_S
from enginehouse.regress.speed.settling import Answer, settle
from enginehouse.regress.speed.turn import Turn
from enginehouse.regress.speed.turns import LoadTurns, Patience, take_turns

MARGINS = {"tokens_per_s": 0.05, "ttft_ms": 0.15, "step_ms": 0.05}
PATIENCE = Patience(8, 40, 16, 60)


class Machine:
    """Slows down by a percent at each turn, as a hot one does; remembers who was asked what."""

    def __init__(self, seed: int = 1) -> None:
        self.asked: list[tuple[str, Sequence[str]]] = []
        self._random = np.random.default_rng(seed)

    def server(self, name: str, speed: float = 1.0) -> Callable[[Sequence[str]], Turn]:
        def turn(prompts: Sequence[str]) -> Turn:
            self.asked.append((name, prompts))
            slow = 1.01 ** len(self.asked) / speed * float(np.exp(self._random.normal(0, 0.02)))
            return Turn(2, 64, 0.5 * slow, [20 * slow] * 2, [5 * slow] * 2, [5 * slow] * 62)

        return turn


def turns(machine: Machine, speed: float) -> LoadTurns:
    return take_turns(
        2,
        machine.server("A"),
        machine.server("B", speed),
        lambda pair: [f"prompt {pair}"],
        MARGINS,
        0.99,
        PATIENCE,
    )


def test_the_order_turns_round_and_both_are_asked_the_same() -> None:
    machine = Machine()
    turns(machine, 1.0)
    names = "".join(name for name, _ in machine.asked)
    assert names.startswith("ABBAABBA") and len(names) % 2 == 0
    for first, second in zip(machine.asked[::2], machine.asked[1::2], strict=True):
        assert {first[0], second[0]} == {"A", "B"} and first[1] == second[1]
    prompts = [prompts for _, prompts in machine.asked[::2]]
    assert len({tuple(each) for each in prompts}) == len(prompts)


def test_a_machine_that_slows_down_makes_no_engine_worse() -> None:
    machine = Machine()
    load = turns(machine, 1.0)
    assert len(load.pairs) < PATIENCE.most  # it was settled before
    for metric in (TOKENS_PER_S, STEP):
        interval = load.interval(metric, 0.99)
        assert interval is not None and settle(interval, 0.05) is Answer.SAME


@pytest.mark.parametrize(("speed", "answer"), [(1 / 1.1, Answer.WORSE), (1.12, Answer.BETTER)])
def test_a_tenth_is_seen_both_ways(speed: float, answer: Answer) -> None:
    load = turns(Machine(seed=2), speed)
    assert answer is Answer.BETTER or len(load.pairs) >= PATIENCE.to_differ
    interval = load.interval(TOKENS_PER_S, 0.99)
    assert interval is not None and settle(interval, 0.05) is answer


def test_what_cannot_be_settled_ends_with_its_turns() -> None:
    load = turns(Machine(seed=3), 0.95)
    assert 8 <= len(load.pairs) <= PATIENCE.most


def test_answers_in_one_piece_have_no_step() -> None:
    def whole(prompts: Sequence[str]) -> Turn:
        return Turn(1, 8, 0.5, [500.0], [0.0], [])

    load = take_turns(1, whole, whole, lambda pair: ["a"], MARGINS, 0.99, Patience(2, 4, 4, 9))
    assert load.interval(STEP, 0.99) is None and load.interval(TOKENS_PER_S, 0.99) is not None
