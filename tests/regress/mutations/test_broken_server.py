"""When a proxy that slows a stream passes its events on."""

from __future__ import annotations

import pytest

from doubles.broken_server import steps_10_percent_slower, ttft_doubled

ASKED_S, CAME_S = 100.0, [100.5, 100.6, 100.8, 101.8]


def test_every_step_is_a_tenth_slower_and_the_first_token_is_not() -> None:
    sent = [steps_10_percent_slower(came, ASKED_S, CAME_S[0]) for came in CAME_S]
    assert sent == pytest.approx([100.5, 100.61, 100.83, 101.93])


def test_the_first_token_takes_twice_as_long_and_no_step_does() -> None:
    sent = [ttft_doubled(came, ASKED_S, CAME_S[0]) for came in CAME_S]
    assert sent == pytest.approx([101.0, 101.1, 101.3, 102.3])
