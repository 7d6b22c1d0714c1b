"""The line of throughput: rates of the time since the last one, and silence when nothing moves."""

from __future__ import annotations

from dataclasses import replace

from enginehouse.runtime.host.throughput import Throughput
from enginehouse.runtime.request import ExecutorStats

IDLE = ExecutorStats(num_kv_blocks=100, num_free_kv_blocks=100)
BUSY = replace(
    IDLE,
    num_running=3,
    num_waiting=1,
    num_free_kv_blocks=25,
    num_prompt_tokens=600,
    num_cached_tokens=200,
    num_generated_tokens=90,
)


def test_rates_are_those_of_the_time_since_the_last_line() -> None:
    throughput = Throughput(100.0)
    assert throughput.line(BUSY, 109.9) is None, "it is not time yet"
    assert throughput.line(BUSY, 110.0) == (
        "3 running, 1 waiting; prompt 60.0 tokens/s; output 9.0 tokens/s; KV cache 75% held; "
        "25% of prompts found there"
    )
    later = replace(BUSY, num_generated_tokens=190)
    assert throughput.line(later, 130.0) == (
        "3 running, 1 waiting; prompt 0.0 tokens/s; output 5.0 tokens/s; KV cache 75% held"
    )


def test_idle_time_has_no_line_and_the_end_of_traffic_has_one() -> None:
    throughput = Throughput(0.0)
    assert throughput.line(IDLE, 10.0) is None
    ended = replace(IDLE, num_generated_tokens=20)
    assert throughput.line(ended, 20.0) == (
        "0 running, 0 waiting; prompt 0.0 tokens/s; output 2.0 tokens/s; KV cache 0% held"
    )
    assert throughput.line(ended, 30.0) is None
    assert throughput.line(replace(ended, num_waiting=1), 40.0) is not None, "it waits"


def test_what_is_idle_does_not_dilute_what_follows() -> None:
    throughput = Throughput(0.0)
    assert throughput.line(IDLE, 1000.0) is None
    line = throughput.line(replace(IDLE, num_generated_tokens=50), 1010.0)
    assert line is not None and "output 5.0 tokens/s" in line
