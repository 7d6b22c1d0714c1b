"""One answer's outputs as a greenlet takes them: in order, and silence told in time."""

from __future__ import annotations

from typing import cast

import gevent
import pytest

from enginehouse.runtime.errors import HostUnavailable
from enginehouse.runtime.host.client import EngineClient, Generation
from enginehouse.runtime.request import FinishReason, TokenOutput

A, B = TokenOutput(1, [5]), TokenOutput(2, [6], FinishReason.LENGTH)
LAST = TokenOutput(1, [7], FinishReason.STOP)


class Client:
    def __init__(self) -> None:
        self.cancelled: list[int] = []

    def _cancel(self, request_ids: list[int]) -> None:
        self.cancelled += request_ids


@pytest.fixture
def generation() -> Generation:
    return Generation(cast(EngineClient, Client()), [1, 2])


def test_a_wait_is_as_long_as_it_was_asked_for_whatever_was_asked_before(
    generation: Generation,
) -> None:
    with gevent.Timeout(60):
        generation._deliver(A)
        assert generation.get(3600) == (0, A), "its timer runs on"
        assert generation.get(0.01) is None, "and holds no shorter wait up"
        gevent.spawn_later(0.05, generation._deliver, B)
        assert generation.get(3600) == (1, B), "nor does a shorter one end a longer"
        assert generation.get(0.01) is None and generation.get(0) is None
        generation._deliver(LAST)
        assert generation.get(0.01) == (0, LAST)
    generation = Generation(cast(EngineClient, Client()), [1])
    with gevent.Timeout(60):
        generation._deliver(A)
        assert generation.get(0.02) == (0, A)
        assert generation.get(0.1) is None, "the timer of the first wait goes off within it"


def test_no_timer_outlives_the_last_output(generation: Generation) -> None:
    for output in (A, B, LAST):
        generation._deliver(output)
        assert generation.get(3600) is not None
    assert generation.finished and generation._silence._timer is None
    assert generation.get(3600) is None
    generation = Generation(cast(EngineClient, Client()), [1])
    waiting = gevent.spawn(generation.get, 3600)
    gevent.sleep(0)
    generation.cancel()
    assert waiting.get(timeout=60) is None and generation._silence._timer is None


def test_what_can_be_had_without_waiting_is_known(generation: Generation) -> None:
    assert not generation.has_output
    generation._deliver(A)
    generation._deliver(B)
    assert generation.has_output
    generation.cancel(0)
    assert not generation.has_output, "the first is of a choice that was cancelled"
    assert generation.get(60) == (1, B)
    assert not generation.has_output
    generation = Generation(cast(EngineClient, Client()), [1])
    generation._deliver(HostUnavailable("gone"))
    assert not generation.has_output, "an error is no output"
