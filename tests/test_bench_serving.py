"""The bench beside other engines: its arithmetic, its verdicts, and what it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from makers.paths import ROOT

SMAPS = """\
55e673151000-7ffec0b06000 ---p 00000000 00:00 0                          [rollup]
Rss:              700172 kB
Pss:              688454 kB
Pss_Dirty:        615656 kB
"""


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    """As the script itself does it; run_*.py import what lies beside them."""
    folders = [str(ROOT / "scripts"), str(ROOT / "scripts" / "benches")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def bench(name: str) -> ModuleType:
    return import_module(f"benches.{name}")


def test_the_kernel_s_first_line_is_read_without_idle_and_waiting_time() -> None:
    ticks = bench("quiet")._TICKS
    line = f"cpu {1 * ticks} {2 * ticks} {3 * ticks} 999999 888888 {4 * ticks} 0 {5 * ticks} 77 77"
    assert bench("quiet").busy_s(line) == 15  # what a hypervisor took is others'


@pytest.mark.parametrize(
    ("busy", "own", "share"), [(3.0, 1.0, 0.5), (1.0, 1.02, 0.0), (99.0, 0.0, 1.0)]
)
def test_the_share_of_others_is_of_all_cores_and_never_outside_0_to_1(
    busy: float, own: float, share: float
) -> None:
    assert bench("quiet").others_share(busy, own, wall=2.0, cores=2) == share


def test_what_an_ended_child_has_used_is_our_own() -> None:
    used = bench("quiet").own_s
    before, alone = used(None), used([])
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-S", "-c", burn], check=True, timeout=60)
    assert used(None) >= before + 0.18  # in ticks of 10 ms
    assert used([]) < alone + 0.15  # and not where it is not what is measured


def test_patience_is_spent_once() -> None:
    patience = bench("quiet").Patience(0.0)
    patience.wait()
    assert patience.left == 0.0


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    figures = bench("figures").Figures()
    sample = bench("figures").Sample
    for ours, theirs in ((10, 5), (40, 10), (9, 3)):  # the machine's speed drifts
        figures.add("tokens/s", "ours", sample(ours, 0.0))
        figures.add("tokens/s", "theirs", sample(theirs, 0.2))
    assert figures.ratio("tokens/s", "ours", "theirs") == 3
    assert figures.median("tokens/s", "ours") == 10
    assert figures.busy("tokens/s", "theirs") == 0.2
    assert figures.ratio("tokens/s", "ours", "nobody") is None


def test_gaps_are_those_open_while_something_happens() -> None:
    figures = bench("figures")
    streams = [[0.0, 1.0, 2.0, 5.0, 6.0], [0.5, 1.5]]
    assert figures.gaps(streams) == [1.0, 1.0, 3.0, 1.0, 1.0]
    assert figures.gaps(streams, 2.5, 4.0) == [3.0]
    assert figures.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert figures.percentile([4.0, 1.0, 3.0, 2.0], 0.99) == 4.0


@pytest.mark.parametrize(
    ("ours", "word"), [(22.0, "met"), (21.0, "**not met**"), (None, "not measured")]
)
def test_a_verdict_says_whether_a_goal_is_met(ours: float | None, word: str) -> None:
    goals, figures = bench("goals"), bench("figures").Figures()
    what = goals.THROUGHPUT.format(1)
    figures.add(what, goals.PEER, bench("figures").Sample(10.0, 0.0))
    if ours is not None:
        figures.add(what, "int8", bench("figures").Sample(ours, 0.0))
    goal = goals.Goal("in process", what, "int8", 2.2, True)
    head, row = goals.verdict_rows([goals.judge(goal, figures)])
    assert row[3] == word and row[1] == ">= 2.2x" and len(head) == len(row)


def test_a_verdict_of_a_busy_machine_says_so() -> None:
    goals, figures = bench("goals"), bench("figures").Figures()
    figures.add(goals.READY, "int8", bench("figures").Sample(1.2, 0.0))
    figures.add(goals.READY, goals.PEER, bench("figures").Sample(4.0, 0.5))
    to_peer = goals.Goal("ready", goals.READY, "int8", 0.5)
    alone = goals.Goal("ready, seconds", goals.READY, "int8", 1.5, base=goals.ITSELF)
    rows = goals.verdict_rows([goals.judge(goal, figures) for goal in (to_peer, alone)])
    assert [row[2:] for row in rows[1:]] == [["0.30x", "met, not quiet"], ["1.20", "met"]]
    [head, row] = goals.figure_rows(figures)
    assert head == ["", "int8", goals.PEER]
    assert row == [goals.READY, "1.2 (1)", "4 (1), others 50%"]


def test_every_goal_has_a_figure_that_is_measured() -> None:
    goals = bench("goals")
    names = ["int8", "bf16", "http int8"]
    found = list(goals.goals(names))
    assert {goal.who for goal in found} == set(names)
    loads = [goal for goal in found if goal.what == goals.THROUGHPUT.format(16)]
    assert [goal.bound for goal in loads] == [1.6, 1.15, 1.3]
    assert len({goal.title for goal in found}) == len(found)


def test_a_table_is_markdown() -> None:
    assert bench("goals").markdown([["a", "b"], ["1", "2"]]) == (
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    )


def test_memory_is_what_a_process_has_of_shared_pages_and_its_own() -> None:
    assert bench("contender").pss_bytes(SMAPS) == 688454 * 1024


def test_events_are_read_across_pieces_of_a_stream() -> None:
    load = import_module("run_load")
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, second = (b"data: " + json.dumps({"n": n}).encode() + b"\n\n" for n in (1, 2))
    pieces = [(1.0, head + b"1a\r\n" + first[:9]), (2.0, first[9:] + second), (3.0, b"")]
    assert load.events(pieces) == [(2.0, {"n": 1}), (2.0, {"n": 2})]
    with pytest.raises(ValueError, match="HTTP/1.1 503"):
        load.events([(1.0, b"HTTP/1.1 503 No\r\n\r\nbusy")])


def test_a_step_s_work_is_counted_from_the_packed_network() -> None:
    from enginehouse.runtime.cpu.packed_file import LayerShape, LinearShape

    linears = {
        "0.qkv": LinearShape("int4", 64, 128, group=64, input="bytes", narrow_scales=True),
        "lm_head": LinearShape("bf16", 32, 64),
    }
    layers = [LayerShape(64, 0, 32, 1, None), LayerShape(64, 1, 32, 0, None)]
    # what is read of a Network
    network = SimpleNamespace(linears=linears, heads=2, kept="bf16", of_layers=layers)
    work = bench("machine").step_work(network, batch=3, context=10)
    assert work.weight_bytes == 64 * 128 / 2 + 64 * 2 * 2 + 32 * 64 * 2
    assert work.kv_bytes == 3 * 10 * 2 * 32 * 2
    pairs = 3 * 10 * 2 * 32
    assert work.operations == {"int8": 2 * 3 * 64 * 128, "bf16": 2 * 3 * 32 * 64 + 4 * pairs}
    limits = bench("machine").Limits(1e3, 1e3, {"int8:avx2": 1e6, "float32:fma": 1e5})
    computing = work.operations["int8"] / 1e6 + work.operations["bf16"] / 1e5
    assert limits.seconds(work) == max((work.weight_bytes + work.kv_bytes) / 1e3, computing)
