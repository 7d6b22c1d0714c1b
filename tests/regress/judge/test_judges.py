"""What two recordings come to, of made-up figures whose right verdict is plain."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from enginehouse.regress.findings import Finding, Status, Verdict, verdict_of
from enginehouse.regress.judge.asked import judge_asked
from enginehouse.regress.judge.comparison import Comparison
from enginehouse.regress.judge.numerics import (
    judge_divergence,
    judge_greedy,
    judge_perplexity,
    judge_self,
    perplexity_ratios,
    text_divergences,
)
from enginehouse.regress.judge.quality import judge_tasks
from enginehouse.regress.judge.reference import judge_reference
from enginehouse.regress.judge.speed import judge_memory, judge_recorded, judge_starts, judge_turns
from enginehouse.regress.judge.tokens import judge_tokens
from enginehouse.regress.limits import load_limits
from enginehouse.regress.outcome import TextDivergence
from enginehouse.regress.recording import Noise, Recording, Solved
from enginehouse.regress.speed.turn import Turn
from enginehouse.regress.speed.turns import LoadTurns, Pair
from enginehouse.regress.suite.suite import Prompt, Suite
from makers.recordings import MANIFEST, answer, recording, score

LIMITS = load_limits()
SUITE = Suite("s", [], [Prompt("ask", messages=[{"role": "user", "content": "?"}])], [])
OTHER_VERSION = replace(MANIFEST, versions={"torch": "9"}, digest="sha256:new")
REQUANTISED = replace(MANIFEST, choices={"quant": "int4", "tp": 1}, digest="sha256:new")
OTHER_WEIGHTS = replace(MANIFEST, source={"digest": "sha256:bb"}, digest="sha256:new")


def both(old: Recording | None, new: Recording) -> Comparison:
    return Comparison(old, new, LIMITS)


def by_check(findings: Iterable[Finding]) -> dict[str, Status]:
    return {finding.check: finding.status for finding in findings}


def divergence(new: Recording, old: Recording | None = None) -> dict[str, Status]:
    pair = both(old or recording(), new)
    return by_check(judge_divergence(pair, text_divergences(pair)))


def test_the_same_recording_passes_everything() -> None:
    pair = both(recording(), recording())
    findings = [
        *judge_divergence(pair, text_divergences(pair)),
        *judge_perplexity(pair, perplexity_ratios(pair)),
        *judge_asked(pair),
        *judge_tokens(pair, SUITE),
        *judge_greedy(pair),
        *judge_self(pair),
        *judge_tasks(pair),
        *judge_recorded(pair),
        *judge_memory(pair),
        *judge_starts([1.5, 1.6, 1.5], [1.5, 1.5, 1.6], LIMITS),
    ]
    assert {finding.check for finding in findings} >= {"kl", "perplexity", "greedy", "tasks"}
    assert {finding.status for finding in findings} == {Status.PASSED}
    assert verdict_of(findings) is Verdict.PASSED


@pytest.mark.parametrize(
    ("manifest", "shift", "status"),
    [
        (MANIFEST, 0.002, Status.REGRESSED),  # a rebuild has the same numbers
        (OTHER_VERSION, 0.002, Status.PASSED),
        (OTHER_VERSION, 0.3, Status.REGRESSED),
        (REQUANTISED, 0.3, Status.PASSED),
        (OTHER_WEIGHTS, 0.3, Status.NOT_JUDGED),
        (None, 0.3, Status.REGRESSED),
    ],
)
def test_how_much_may_differ_depends_on_how_near_the_builds_are(
    manifest: Any, shift: float, status: Status
) -> None:
    assert divergence(recording(manifest=manifest, scores=[score(shift=shift)]))["kl"] is status


def test_only_the_old_engine_s_noise_is_allowed_to_the_new_one() -> None:
    noise, moved = Noise(2e-4, 1e-3), [score(shift=0.02)]
    noisy = recording(noise=noise)
    assert divergence(recording(noise=noise, scores=moved), noisy)["kl"] is Status.PASSED
    assert divergence(recording(noise=noise, scores=moved))["kl"] is Status.REGRESSED
    assert divergence(recording(scores=moved))["kl"] is Status.REGRESSED


def test_a_rebuild_on_another_machine_may_add_in_another_order() -> None:
    moved = [score(shift=0.002)]
    elsewhere = recording(scores=moved, machine={"cpu": "another"})
    assert divergence(elsewhere)["kl"] is Status.PASSED
    more = recording(scores=moved, machine={"cpu": "a CPU", "cores": "2", "memory": "9 GiB"})
    assert divergence(more)["kl"] is Status.REGRESSED, "memory adds nothing"


def test_another_kind_of_server_need_not_do_the_same() -> None:
    untold = [replace(answer("a b x d"), prompt_ids=None)]
    pair = both(recording(), recording(answers=untold, server="vllm", manifest=None))
    found = [*judge_greedy(pair), *judge_divergence(pair, [])]
    told = {each.check: each.status for each in found if "no token ids" in each.sentence}
    assert told == {"greedy": Status.NOT_JUDGED, "answer_kl": Status.NOT_JUDGED}
    silent = recording(scores=[], solved=[], left_out={"texts": "no", "tasks": "no"}, server="vllm")
    assert divergence(silent)["kl"] is Status.NOT_JUDGED
    assert not list(judge_tasks(both(recording(), silent)))
    assert not list(judge_asked(both(recording(), silent)))


def test_texts_that_are_no_longer_scored_are_a_regression_and_never_scored_ones_none() -> None:
    silent = recording(scores=[], left_out={"texts": "the server tells none"})
    assert divergence(silent)["kl"] is Status.REGRESSED
    assert divergence(silent, silent)["kl"] is Status.NOT_JUDGED


@pytest.mark.parametrize(
    ("max_seq_len", "status"), [(4096, Status.REGRESSED), (2048, Status.NOT_JUDGED)]
)
def test_a_prompt_that_only_the_new_engine_refuses_is_a_regression(
    max_seq_len: int, status: Status
) -> None:
    manifest = replace(MANIFEST, limits=replace(MANIFEST.limits, max_seq_len=max_seq_len))
    refused = recording(manifest=manifest, answers=[], left_out={"prompt ask": "refused: too long"})
    assert by_check(judge_asked(both(recording(), refused))) == {"asked": status}
    assert by_check(judge_asked(both(refused, refused))) == {"asked": Status.PASSED}
    assert not list(judge_asked(both(recording(scores=[], answers=[]), refused)))


def test_tasks_that_only_the_new_engine_refuses_are_a_regression() -> None:
    refused = recording(solved=[], left_out={"tasks": "refused: no"})
    assert by_check(judge_tasks(both(recording(), refused))) == {"tasks": Status.REGRESSED}
    assert by_check(judge_tasks(both(refused, recording()))) == {"tasks": Status.NOT_JUDGED}
    assert not list(judge_tasks(both(refused, refused)))


@pytest.mark.parametrize(
    ("manifest", "text", "status"),
    [
        (MANIFEST, "a b x d", Status.REGRESSED),
        (OTHER_VERSION, "a b other d", Status.PASSED),  # a nat away
        (OTHER_VERSION, "a b x d", Status.NOT_JUDGED),  # of x nothing was told: a nat at least
        (OTHER_VERSION, "a b c", Status.NOT_JUDGED),  # how near its end was is not told
        (REQUANTISED, "a b x d", Status.PASSED),
        (OTHER_WEIGHTS, "x", Status.NOT_JUDGED),
    ],
)
def test_where_greedy_answers_part_it_has_to_be_a_near_tie(
    manifest: Any, text: str, status: Status
) -> None:
    pair = both(recording(), recording(manifest=manifest, answers=[answer(text)]))
    assert by_check(judge_greedy(pair)) == {"greedy": status}


def test_a_loss_of_perplexity_is_a_ratio_with_its_interval() -> None:
    pair = both(recording(), recording(scores=[score(shift=-0.1)]))
    ratios = perplexity_ratios(pair)
    assert [ratio.texts for ratio in ratios] == ["all", "prose"]
    assert ratios[0].ratio == pytest.approx(math.exp(0.1))
    assert by_check(judge_perplexity(pair, ratios)) == {"perplexity": Status.REGRESSED}


@pytest.mark.parametrize(
    ("new", "check"),
    [
        (recording(scores=[replace(score(), ids=[1] + [5] * 59 + [6])]), "tokenizer"),
        (recording(answers=[answer(prompt_ids=[1, 9, 2, 3])]), "chat_template"),
        (recording(answers=[answer("a b c d e f", finish="length")]), "end_tokens"),
        (
            recording(manifest=replace(MANIFEST, model=replace(MANIFEST.model, eos_token_ids=()))),
            "end_tokens",
        ),
    ],
)
def test_tokens_that_are_others_are_flagged_by_name(new: Recording, check: str) -> None:
    found = by_check(judge_tokens(both(recording(), new), SUITE))
    assert {name for name, status in found.items() if status is Status.REGRESSED} == {check}


def test_an_engine_that_is_not_equal_to_itself_is_flagged_by_its_backends_limit() -> None:
    noisy = recording(noise=Noise(0.001, 0.1, 0.0, 0.0))
    assert by_check(judge_self(both(None, noisy))) == {
        "batch": Status.REGRESSED,
        "prefix": Status.PASSED,
    }
    torch = replace(noisy, head=replace(noisy.head, manifest=replace(MANIFEST, backend="torch")))
    assert by_check(judge_self(both(None, torch)))["batch"] is Status.PASSED


def test_tasks_that_are_lost_are_a_regression_only_beyond_chance() -> None:
    def solved(right: int) -> list[Solved]:
        return [Solved(f"sums.{i}", "sums", i < right, "") for i in range(20)]

    old = recording(solved=solved(15))
    for right, status in ((15, Status.PASSED), (10, Status.PASSED), (5, Status.REGRESSED)):
        pair = both(old, recording(solved=solved(right)))
        assert by_check(judge_tasks(pair)) == {"tasks": status}


def test_the_source_is_the_judge_and_the_older_engine_the_measure() -> None:
    pair = both(recording(), recording())
    near, far = [TextDivergence("t", [0.001] * 9)], [TextDivergence("t", [0.015] * 9)]
    assert by_check(judge_reference(pair, near, near)) == {"reference_kl": Status.PASSED}
    assert by_check(judge_reference(pair, far, [])) == {"reference_kl": Status.PASSED}  # int8's
    assert by_check(judge_reference(pair, far, near)) == {"reference_kl": Status.REGRESSED}


def test_memory_by_a_third_and_starts_at_twice_the_time_are_flagged() -> None:
    pair = both(recording(), recording(peak_bytes=400 << 20))
    assert by_check(judge_memory(pair)) == {"memory_mib": Status.REGRESSED}
    starts = judge_starts([1.5, 1.6, 1.5], [3.0, 3.1, 3.2], LIMITS)
    assert by_check(starts) == {"start_s": Status.REGRESSED}


def turns(slower: float = 1.0, ttft: float = 1.0) -> list[Turn]:
    return [
        Turn(
            4,
            128,
            (0.5 + i / 500) * slower,
            [40.0 * ttft] * 4,
            [6.0 * slower] * 4,
            [6.0 * slower] * 124,
        )
        for i in range(16)
    ]


@pytest.mark.parametrize(
    ("new", "worse"),
    [
        (turns(), set()),
        (turns(slower=1.1), {"tokens_per_s.4", "step_ms.4"}),
        (turns(ttft=2.0), {"ttft_ms.4"}),
        (turns(slower=0.8), set()),
    ],
)
def test_turns_are_judged_metric_by_metric(new: list[Turn], worse: set[str]) -> None:
    load = LoadTurns(4, [Pair(old, after) for old, after in zip(turns(), new, strict=True)])
    found = by_check(judge_turns([load], LIMITS))
    assert {check for check, status in found.items() if status is Status.REGRESSED} == worse
    assert len(found) == 3 and Status.CANNOT_TELL not in found.values()


def recorded(new: Recording, old: Recording | None = None) -> dict[str, Status]:
    return by_check(judge_recorded(both(old or recording(turns=turns()), new)))


@pytest.mark.parametrize(
    ("slower", "status"),
    [
        (0.5, Status.PASSED),
        (1.2, Status.PASSED),
        (1.6, Status.CANNOT_TELL),
        (2.2, Status.CANNOT_TELL),
        (3.0, Status.REGRESSED),
    ],
)
def test_recorded_figures_count_when_they_are_far_away(slower: float, status: Status) -> None:
    found = recorded(recording(turns=turns(slower)))
    assert found["tokens_per_s.4"] is found["step_ms.4"] is status


def test_recorded_figures_are_compared_with_what_was_asked_alike_on_such_a_machine() -> None:
    slow = turns(3.0)
    for new in (
        recording(turns=slow, machine={"cpu": "another"}),
        recording(turns=slow, machine={}),
        recording(turns=slow, groups=["speed"]),
        recording(turns=slow, loads=LIMITS.turns),
    ):
        assert recorded(new) == {"recorded": Status.NOT_JUDGED}
        assert by_check(judge_memory(both(recording(), new))) == {"memory_mib": Status.NOT_JUDGED}
    silent = recording(turns=[])
    assert recorded(recording(turns=slow), silent) == {"recorded": Status.NOT_JUDGED}
    lost = recording(turns=[], left_out={"turns": "a stream failed"})
    assert recorded(lost) == {"streams": Status.REGRESSED}
    quick = [Turn(4, 128, 0.5, [40.0], [0.1 * i], [0.1]) for i in (1, 20)]
    found = recorded(recording(turns=quick[1:]), recording(turns=quick[:1]))
    assert found["step_ms.4"] is Status.NOT_JUDGED


def test_a_side_that_fails_under_load_is_a_finding() -> None:
    def failed(*sides: str) -> dict[str, Status]:
        load = LoadTurns(16, failed={side: "it was lost" for side in sides})
        return by_check(judge_turns([load], LIMITS))

    assert failed("new") == {"streams.16": Status.REGRESSED}
    assert failed("old") == failed("old", "new") == {"streams.16": Status.NOT_JUDGED}


@pytest.mark.parametrize(
    ("manifest", "lost", "status"),
    [
        (MANIFEST, 1, Status.REGRESSED),
        (REQUANTISED, 1, Status.PASSED),  # it was in doubt
        (REQUANTISED, 3, Status.REGRESSED),  # every one of them
        (OTHER_WEIGHTS, 3, Status.NOT_JUDGED),
    ],
)
def test_an_end_token_is_lost_where_every_answer_goes_on(
    manifest: Any, lost: int, status: Status
) -> None:
    old = recording(answers=[answer(name=str(i)) for i in range(3)])
    goes_on = [answer("a b c d e", name=str(i), finish="length") for i in range(lost)]
    new = recording(manifest=manifest, answers=goes_on + old.answers[lost:])
    assert by_check(judge_tokens(both(old, new), SUITE))["end_tokens"] is status


def test_a_shorter_context_is_no_other_tokenizer() -> None:
    cut = score()
    cut = replace(cut, ids=cut.ids[:21], chosen=cut.chosen[:20], top=cut.top[:20])
    pair = both(recording(), recording(scores=[cut]))
    assert by_check(judge_tokens(pair, SUITE))["tokenizer"] is Status.PASSED
    assert [len(text.kl) for text in text_divergences(pair)] == [20]
