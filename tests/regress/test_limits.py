"""Limits: the defaults, a user's own over them, and no key that nothing reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.build.stages import BACKENDS
from enginehouse.build.verify import MAX_MEAN_KL
from enginehouse.regress.explain import Relation
from enginehouse.regress.limits import Kl, load_limits
from enginehouse.regress.speed.metrics import METRICS
from enginehouse.runtime.errors import EnginehouseError


def test_the_defaults_have_a_limit_for_everything_that_is_judged() -> None:
    limits = load_limits()
    judged = {relation.value for relation in Relation} - {Relation.OTHER_WEIGHTS.value}
    assert limits.kl.keys() == limits.greedy_tie.keys() == judged
    assert limits.perplexity.keys() == {relation.value for relation in Relation}
    assert limits.reference_kl.keys() == MAX_MEAN_KL.keys()
    assert limits.speed.keys() == {metric.key for metric in METRICS}
    assert limits.self_kl.keys() == {*BACKENDS} - {"hf"} | {"url"}


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("kl: {reordered: {mean: 0.001}}\nturns: {clients: [2]}\n")
    limits, default = load_limits(path), load_limits()
    assert limits.kl["reordered"] == Kl(0.001, default.kl["reordered"].largest)
    assert limits.turns.clients == [2] and limits.speed == default.speed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed: {tokens: 0.1}", "tokens is no limit; known here are tokens_per_s"),
        ("kl: 3", "found int; wanted keys and values"),
        ("level: high", "level"),
        ("level: 2", "level is 2.0; wanted more than 0 and less than 1"),
        ("task_p: 0", "task_p is 0.0; wanted more than 0"),
        ("speed: {ttft_ms: 1.5}", "ttft_ms is 1.5; wanted a share between 0 and 1"),
        ("turns: {clients: [0]}", "wanted counts from 1"),
        ("turns: {clients: []}", "wanted counts from 1"),
        ("turns: {least: 9, most: 4}", "most from least"),
        ("[1]", "found list"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(text)
    with pytest.raises(EnginehouseError) as caught:
        load_limits(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
