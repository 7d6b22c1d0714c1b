"""Paths and types of answers, and which of them a client would miss."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.regress.behaviour.shapes import compare_shapes, shape_of

PLAIN = {"choices": [{"message": {"content": "a", "refusal": None}}], "usage": {"cost": 0.5}}


def test_lists_are_merged_and_numbers_are_one_type() -> None:
    assert shape_of([{"a": [{"b": 1}, {"b": 1.5, "c": None}]}, {"d": True}]) == [
        "$: object",
        "a: array",
        "a[].b: number",
        "a[].c: null",
        "a[]: object",
        "d: boolean",
    ]


def test_what_stands_under_a_token_is_one_path() -> None:
    older = {"logprobs": {"top_logprobs": [None, {" the": -1.0, "a": -2}]}}
    scored = {"prompt_logprobs": [None, {"17": {"rank": 1}}, {"4": {"rank": 2}}]}
    chat = {"top_logprobs": [{"token": "a", "logprob": -1.0}]}
    assert "logprobs.top_logprobs[].*: number" in shape_of([older])
    assert "prompt_logprobs[].*.rank: number" in shape_of([scored])
    assert "top_logprobs[].logprob: number" in shape_of([chat])


def changes(old: Any, new: Any) -> tuple[list[str], list[tuple[str, str, str]]]:
    found = compare_shapes(shape_of([old]), shape_of([new]))
    return found.gone, found.changed


def test_only_the_outermost_of_what_is_gone_is_named() -> None:
    assert changes(PLAIN, {"choices": PLAIN["choices"]}) == (["usage"], [])
    assert changes(PLAIN, {**PLAIN, "usage": None}) == ([], [("usage", "object", "null")])


def test_a_type_that_changed_is_told() -> None:
    assert changes(PLAIN, {**PLAIN, "usage": {"cost": "0.5"}}) == (
        [],
        [("usage.cost", "number", "string")],
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"content": "a"}, {"content": None}),
        ({"content": None}, {"content": "a"}),
        ({"stop_reason": 5}, {"stop_reason": None}),
        ({"logprobs": [{"bytes": [1]}]}, {"logprobs": []}),
        ({"logprobs": [{"bytes": [1]}]}, {"logprobs": [{"bytes": None}]}),
        ({"logprobs": [{"bytes": [1]}]}, {"logprobs": [{"bytes": []}]}),
        ({"message": {"reasoning_content": "a"}}, {"message": {}}),
        ({"cost": None}, {"cost": 0.5}),
    ],
)
def test_what_the_answer_decides_is_no_change(old: Any, new: Any) -> None:
    assert changes(old, new) == ([], [])


def test_what_the_server_decides_is_a_change() -> None:
    assert changes({"cost": 0.5}, {"cost": None})[1] == [("cost", "number", "null")]
    assert changes({"content": "a"}, {"content": 5})[1] == [("content", "string", "number")]
    assert changes({"content": "a"}, {})[0] == ["content"]
    assert changes({"a": [{"b": 1}]}, {"a": [{}]})[0] == ["a[].b"]
