"""The arithmetic of a load: rates, times, equal texts, and texts that went to the wrong client."""

from __future__ import annotations

import random

import numpy as np

from enginehouse.server.client.levels import common_share, percentile, summarise
from enginehouse.server.client.load import Round, mix_ups
from enginehouse.server.client.stream_reader import Stream


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    numbers = random.Random(7)
    for length in (1, 2, 3, 10, 99, 100, 101):
        values = [numbers.random() for _ in range(length)]
        for share in (0.5, 0.99):
            wanted = np.percentile(values, 100 * share, method="inverted_cdf")
            assert percentile(values, share) == wanted
    assert percentile([], 0.5) is None


def test_texts_that_part_late_share_most() -> None:
    assert common_share("abcd", "abXd") == 0.5 == common_share("ab", "abcd")
    assert common_share("", "") == 1


def test_a_level_measures_first_tokens_and_gaps() -> None:
    stream = Stream("a", "text", 6, "stop", (0.5, 0.75, 1.0), 2.0)
    level = summarise([Round([stream, None], wall_s=2.0)], [stream, stream])
    assert (level.tokens_per_s, level.broken, level.equal) == (3.0, 1, 1)
    assert (level.ttft_p50_ms, level.inter_token_p99_ms) == (500.0, 250.0)


def test_another_clients_text_is_found() -> None:
    alone = [Stream(f"a{n}", text, 1, "stop", (), 0) for n, text in enumerate(("one", "two"))]
    mixed = [Stream(f"b{n}", text, 1, "stop", (), 0) for n, text in enumerate(("two", "twofold"))]
    assert mix_ups(mixed, alone, set()) == ["client 0 was sent the text of client 1"]
