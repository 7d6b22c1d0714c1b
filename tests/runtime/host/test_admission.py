"""Bounds of a queue, by a clock that the test turns."""

from __future__ import annotations

from enginehouse.runtime.host.admission import Admission, QueueLimits
from enginehouse.runtime.request import Refusal


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock | None = None, at_once: int = 2, **limits: float) -> Admission:
    return Admission(QueueLimits()._replace(**limits), at_once, clock or Clock())


def refused(queue: Admission, num_sequences: int = 1, num_tokens: int = 1) -> Refusal:
    refusal = queue.refusal(num_sequences, num_tokens)
    assert refusal is not None
    return refusal


def test_so_many_are_open_as_run_at_once_and_may_wait() -> None:
    queue = admission(max_requests=3)
    for sequence in range(4):
        assert not queue.full
        queue.join(sequence, 10)
        queue.begin(sequence)
    assert not queue.full and queue.refusal(2, 1) is not None, "one finds room, two do not"
    queue.join(4, 10)
    assert queue.full
    found = refused(queue)
    assert (found.status, found.code) == (429, "queue_full")
    assert "5 sequences run or wait here, of at most 5" in found.message
    queue.leave(0)
    assert not queue.full


def test_prompts_that_wait_are_bounded_in_tokens_and_one_alone_is_never_too_long() -> None:
    queue = admission(max_tokens=100)
    assert queue.refusal(1, 5000) is None
    queue.join(1, 5000)
    assert "have 5000 tokens, of at most 100" in refused(queue).message
    queue.begin(1)
    assert queue.refusal(1, 100) is None
    queue.join(2, 60)
    assert queue.refusal(1, 40) is None and queue.refusal(1, 41) is not None
    queue.leave(2)
    assert queue.refusal(1, 100) is None


def test_when_to_come_again_follows_from_how_fast_others_end() -> None:
    """Of a queue of 100 a tenth, at four ends a second: after (1 +) 10 / 4 seconds."""
    clock = Clock()
    queue = admission(clock, at_once=0, max_requests=100)
    for sequence in range(141):
        if sequence >= 100:
            clock.now_s += 0.25
            queue.leave(sequence - 100)
        queue.join(sequence, 1)
    assert queue.full and refused(queue).retry_after_s == 3
    clock.now_s += 3600
    assert refused(queue).retry_after_s == 5, "nothing is known of now"


def test_who_waits_too_long_for_a_first_token_is_overdue() -> None:
    clock = Clock()
    queue = admission(clock, max_wait_s=30)
    queue.join(1, 1)
    clock.now_s += 20
    queue.join(2, 1)
    queue.join(3, 1)
    queue.begin(2)
    assert queue.overdue() == []
    clock.now_s += 10
    assert queue.overdue() == [1]
    queue.leave(1)
    clock.now_s += 3600
    assert queue.overdue() == [3], "one that has begun takes as long as it takes"
    assert (queue.timeout().status, queue.timeout().code) == (503, "queue_timeout")
