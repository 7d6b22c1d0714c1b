"""The fleet on paper, against what queueing theory knows in closed form, and against itself."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from makers.paths import ROOT

SCRIPTS = str(ROOT / "scripts")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, SCRIPTS)
    yield
    sys.path.remove(SCRIPTS)


def simulate(
    policy: str, replicas: int, times: dict[str, Any], work: dict[str, Any], **more: Any
) -> Any:
    service = import_module("fleet.service").ServiceTimes(**times)
    workload = import_module("fleet.workload")
    fleet = import_module("fleet.fleet")
    settings = fleet.FleetSettings(replicas, **more)
    router = import_module("simulate_fleet").POLICIES[policy]
    source = workload.DrawnSource(workload.Workload(**work), settings.seed)
    run = fleet.Fleet(settings, service, source, router)
    return run.run(), run


# One server, one at a time: a request without a prompt to speak of, 100 steps of 1 ms on average.
QUEUE = {"step_s": {1: 0.001}, "prefill_tokens_per_s": 1e12, "slots": 1}
ALONE = {"turns": 1, "systems": 0, "user_tokens": 1, "think_s": 0}
CONVERSATIONS = {"conversations_per_s": 1.2, "turns": 5, "think_s": 4, "system_tokens": 256}
ENGINE = {"step_s": {1: 0.01, 16: 0.02}, "prefill_tokens_per_s": 4000, "slots": 16}


@pytest.mark.parametrize("fixed", [True, False], ids=["M/D/1", "M/M/1"])
@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_one_server_waits_as_pollaczek_and_khinchin_say(fixed: bool, utilisation: float) -> None:
    """Mean wait: rho s / (1 - rho), and half of that where all take as long."""
    service_s = 0.1
    rate = utilisation / service_s
    work = {**ALONE, "conversations_per_s": rate, "answer_tokens": 101, "fixed_answers": fixed}
    out, _ = simulate("round_robin", 1, QUEUE, work, seconds=2000, warm_s=50, seed=3)
    wanted = utilisation * service_s / (1 - utilisation) / (2 if fixed else 1)
    assert out.ttft_mean_s == pytest.approx(wanted, rel=0.15)
    assert out.total_mean_s - out.ttft_mean_s == pytest.approx(service_s, rel=0.02)


def test_littles_law_holds() -> None:
    """Requests inside, as sampled by the clock, are the rate times the time that each is there."""
    work = {**CONVERSATIONS, "turns": 1}
    out, run = simulate("least_loaded", 2, ENGINE, work, seconds=1500, warm_s=0)
    requests = run._requests
    moments = [0.5 + index for index in range(1499)]
    inside = sum(sum(r.arrived_s <= at < r.done_s for at in moments) for r in requests)
    assert inside / len(moments) == pytest.approx(len(requests) / 1500 * out.total_mean_s, rel=0.03)


def test_a_step_is_between_those_that_were_measured(tmp_path: Path) -> None:
    service = import_module("fleet.service")
    times = service.ServiceTimes({1: 0.010, 4: 0.016, 8: 0.020}, 1000)
    steps = [times.step(batch) for batch in (0, 1, 2, 4, 6, 8, 12)]
    assert steps == pytest.approx([0, 0.010, 0.012, 0.016, 0.018, 0.020, 0.024])
    file = tmp_path / "bench.json"
    levels = [{"clients": 1, "inter_token_p50_ms": 8.0}, {"clients": 4, "inter_token_p50_ms": None}]
    file.write_text(json.dumps({"levels": levels}))
    assert service.read_steps(file) == {1: 0.008}
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no level with inter_token_p50_ms; make it with"):
        service.read_steps(file)


def test_answers_alone_take_what_their_steps_take() -> None:
    """300 tokens of prompt in one chunk, then 9 more steps of one sequence."""
    work = {**ALONE, "conversations_per_s": 0.01, "user_tokens": 1, "systems": 1}
    work |= {"system_tokens": 299, "answer_tokens": 10, "fixed_answers": True}
    out, run = simulate(
        "round_robin", 1, {**ENGINE, "cache_blocks": 0}, work, seconds=2000, warm_s=0
    )
    for request in run._requests:
        assert request.first_token_s - request.arrived_s == pytest.approx(
            request.prompt_tokens / 4000
        )
        assert request.done_s - request.first_token_s == pytest.approx(9 * 0.01)


def test_the_same_seed_gives_the_same_and_another_one_another() -> None:
    runs = [
        simulate("prefix", 3, ENGINE, CONVERSATIONS, seconds=120, warm_s=10, seed=seed, mtbf_s=60)[
            0
        ]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_without_a_prefix_in_common_nothing_is_hit() -> None:
    work = {**CONVERSATIONS, "turns": 1, "systems": 0}
    for policy in ("round_robin", "prefix"):
        assert simulate(policy, 2, ENGINE, work, seconds=120, warm_s=0)[0].hit_rate == 0
    none = {**ENGINE, "cache_blocks": 0}
    assert simulate("prefix", 2, none, CONVERSATIONS, seconds=120, warm_s=0)[0].hit_rate == 0


def test_one_replica_is_the_same_by_every_policy() -> None:
    outs = {
        simulate(policy, 1, ENGINE, {**CONVERSATIONS, "conversations_per_s": 0.3}, seconds=200)[0]
        for policy in ("round_robin", "least_loaded", "prefix")
    }
    assert len(outs) == 1


def test_prefix_routing_hits_more_and_answers_sooner_than_the_others() -> None:
    by = {
        policy: simulate(policy, 4, ENGINE, CONVERSATIONS, seconds=400)[0]
        for policy in ("round_robin", "least_loaded", "prefix")
    }
    assert by["prefix"].hit_rate > 0.1 + max(
        by[p].hit_rate for p in ("round_robin", "least_loaded")
    )
    assert by["prefix"].ttft_p50_s < min(by[p].ttft_p50_s for p in ("round_robin", "least_loaded"))
    assert len({out.requests for out in by.values()}) < 4 and by["prefix"].errors == 0


def test_bursts_have_the_same_mean_and_longer_waits() -> None:
    workload = import_module("fleet.workload")
    for arrivals in ("poisson", "bursty"):
        source = workload.DrawnSource(workload.Workload(4.0, arrivals=arrivals), 5)
        moments = source.beginnings()
        count = sum(1 for _ in itertools.takewhile(lambda moment: moment < 4000, moments))
        assert count / 4000 == pytest.approx(4.0, rel=0.1)
    even, bursty = (
        simulate("least_loaded", 4, ENGINE, {**CONVERSATIONS, "arrivals": arrivals}, seconds=400)[0]
        for arrivals in ("poisson", "bursty")
    )
    assert bursty.ttft_p99_s > even.ttft_p99_s


def test_who_had_no_token_is_asked_again_and_who_had_is_an_error() -> None:
    out, run = simulate(
        *("least_loaded", 3, ENGINE, CONVERSATIONS), seconds=400, warm_s=0, mtbf_s=40, mttr_s=5
    )
    lost = [request for request in run._requests if request.error == "replica lost"]
    again = [request for request in run._requests if request.retries]
    assert lost and again and out.errors == sum(bool(r.error) for r in run._requests)
    assert all(r.first_token_s is not None or r.retries > 3 for r in lost)
    assert any(request.done_s and not request.error for request in again)
    assert all((r.done_s is None) == bool(r.error) for r in run._requests)


def test_the_script_prints_a_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = import_module("simulate_fleet")
    file = tmp_path / "out.json"
    words = ["--replicas", "1", "2", "--seconds", "60", "--warm-s", "5", "--json", str(file)]
    assert script.main(words) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 2 + 2 * 3 and "hit rate %" in rows[0]
    runs = json.loads(file.read_text())["runs"]
    assert [run["policy"] for run in runs[:3]] == ["round_robin", "least_loaded", "prefix"]
    with pytest.raises(SystemExit):
        script.main(["--bench", str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err


def test_the_parts_are_measured_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    script = import_module("bench_fleet_parts")
    words = ["--replicas", "2", "--prompt-tokens", "640", "--choices", "3", "--messages", "20"]
    words += ["--blocks", "64"]
    assert script.main(words) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 + 5
    message = script.messages.Outputs([script.TokenOutput(request_id=0, token_ids=[1000])])
    assert f"| 1 | {len(script.messages.encode(message))} |" in rows[5]


def test_clients_lead_one_conversation_after_another() -> None:
    work = {"conversations_per_s": 1, "clients": 3, "num_conversations": 2, "turns": 4}
    work |= {"user_tokens": 50, "answer_tokens": 20, "system_tokens": 100, "think_s": 0}
    out, run = simulate("prefix", 2, ENGINE, work, seconds=10_000, warm_s=0)
    requests = run._requests
    assert out.requests == len(requests) == 3 * 2 * 4 and out.errors == 0
    prompts = sorted({request.prompt_tokens for request in requests})
    assert prompts == [150, 220, 290, 360], "the system prompt, then a question and an answer each"
    for request in requests:
        inside = sum(one.arrived_s <= request.arrived_s < one.done_s for one in requests)
        assert inside <= 3
    alone, run = simulate("prefix", 1, ENGINE, {**work, "clients": 1}, seconds=10_000, warm_s=0)
    ends = [0.0, *(request.done_s for request in run._requests)]
    assert [request.arrived_s for request in run._requests] == ends[:-1], "each when the last ended"


def test_recorded_conversations_are_found_where_they_were_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One replica that forgets nothing finds what a set of all numbers seen before does."""
    draw, lines, seen, wanted = random.Random(7), [], set[int](), []
    beginnings = [[0]]
    for number in range(1, 60):
        full = [*draw.choice(beginnings), number]
        beginnings.append(full)
        hash_ids = [*full, 1000 + number]  # the last stands for less than 512, and is its own
        prompt = 512 * len(full) + draw.choice([1, 64, 500])
        known = itertools.takewhile(seen.__contains__, hash_ids)
        wanted.append(512 * len(list(known)))
        seen.update(hash_ids)
        asked = {"timestamp": 60_000 * number, "input_length": prompt, "output_length": 5}
        lines.append(json.dumps({**asked, "hash_ids": hash_ids}))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines) + "\n")
    source = import_module("fleet.recorded").RecordedSource(trace, speed=2.0)
    assert source.seconds == 59 * 30.0
    times = import_module("fleet.service").ServiceTimes(**ENGINE, cache_blocks=10**6)
    fleet = import_module("fleet.fleet")
    settings = fleet.FleetSettings(1, seconds=source.seconds + 1, warm_s=0)
    run = fleet.Fleet(settings, times, source, import_module("simulate_fleet").POLICIES["prefix"])
    out = run.run()
    assert [request.cached_tokens for request in run._requests] == wanted
    assert out.requests == 59 and out.errors == 0
    words = ["--trace", str(trace), "--replicas", "2", "--policies", "prefix", "--warm-s", "0"]
    script = import_module("simulate_fleet")
    assert script.main(words) == 0 and "| 2 | prefix | 59 |" in capsys.readouterr().out
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}')
    with pytest.raises(SystemExit):
        script.main(words)
    assert "trace.jsonl:1: 600 tokens of a prompt are not what 1" in capsys.readouterr().err


def test_jitter_leaves_the_middle_where_it_was() -> None:
    work = {"conversations_per_s": 0.5, "think_s": 4, "system_tokens": 256}
    even, uneven = (
        simulate("least_loaded", 2, {**ENGINE, "jitter": jitter}, work, seconds=400)[0]
        for jitter in (0.0, 0.5)
    )
    assert uneven.ttft_p50_s == pytest.approx(even.ttft_p50_s, rel=0.2)
    assert uneven.ttft_p99_s > 1.2 * even.ttft_p99_s
