from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from doubles.scripted_client import ScriptedGeneration
from enginehouse.runtime.errors import EngineError, HostUnavailable
from enginehouse.runtime.request import FinishReason, TokenOutput
from enginehouse.server.answer.completion import ClientGone, Delta, Prices
from enginehouse.server.text.answer import Content, Reasoning
from makers.completions import PRICES, completion, play
from makers.token_outputs import LENGTH, PIECES, STOP, TOKENIZER, output, tokens


def test_a_whole_answer_has_the_page_s_shape() -> None:
    answer = completion()
    play(answer, tokens("Hello the dog", STOP))
    num_tokens = len(TOKENIZER.encode("Hello the dog").ids)
    assert answer.whole() == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "tiny",
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello the dog",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 15,
            "completion_tokens": num_tokens,
            "total_tokens": 15 + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "estimated_cost": PRICES.cost(15, num_tokens),
        },
    }


@pytest.mark.parametrize(
    ("prices", "counts", "cost"),
    [
        (("0.59", "0.79"), (149, 338), 0.00035493),  # the page's own example
        (("0.35", "0.40"), (15, 16), 0.00001165),
        (("0.1", "0.2"), (3, 0), 0.0000003),
        (("0", "0"), (10**6, 10**6), 0.0),
    ],
)
def test_the_cost_is_exact(prices: tuple[str, str], counts: tuple[int, int], cost: float) -> None:
    assert Prices(Decimal(prices[0]), Decimal(prices[1])).cost(*counts) == cost


def test_chunks_give_the_role_once_then_text_then_an_empty_delta() -> None:
    answer = completion()
    deltas, _ = play(answer, [(0, output("Hi")), (0, output(" the", LENGTH))])
    chunks = answer.opening()
    for delta in deltas:
        assert delta is not None
        chunks += answer.told(delta)
    chunks += answer.closing()
    deltas_and_ends: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({"role": "assistant", "content": ""}, {"finish_reason": None}),
        ({"content": "Hi"}, {"finish_reason": None}),
        ({"content": " the"}, {"finish_reason": None}),
        ({}, {"finish_reason": "length", "stop_reason": None}),
    ]
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, **end}] for delta, end in deltas_and_ends
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_and_alone_when_asked_for() -> None:
    answer = completion(include_usage=True)
    play(answer, tokens("Hi", STOP))
    assert answer.opening()[0]["usage"] is None
    [last] = answer.closing()
    assert (last["choices"], last["usage"]) == ([], answer.usage())


@pytest.mark.parametrize("stops", [(" lazy",), ("zy d", "dog")])
def test_a_stop_string_over_token_borders_ends_the_choice_and_cancels_it(
    stops: tuple[str, ...],
) -> None:
    answer = completion(stops=stops)
    _, generation = play(answer, tokens("the lazy dog and more", STOP))
    text = answer.whole()["choices"][0]["message"]["content"]
    assert text == "the lazy dog"[: "the lazy dog".find(stops[0])]
    assert answer.choices[0].finish_reason == "stop"
    assert generation.cancels == [0]


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    ids = [TOKENIZER.encode(char).ids[0] for char in "abcdef"]
    answer = completion(stops=("c",))
    play(answer, [(0, output(ids))])
    assert (answer.choices[0].text, answer.num_completion_tokens) == ("ab", 3)


def test_what_was_held_is_shown_when_the_engine_ends_the_choice() -> None:
    answer = completion(stops=("dogs",))
    _, generation = play(answer, tokens("the dog", LENGTH))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the dog", "length")
    assert generation.cancels == []


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_an_answer_cut_within_a_character_drops_the_character(num_bytes: int) -> None:
    ids = {PIECES.piece(token_id, False): token_id for token_id in range(300)}
    half = [ids[bytes([byte])] for byte in "🙂".encode()[:num_bytes]]
    answer = completion()
    play(answer, [(0, output("a")), (0, output(half, LENGTH))])
    assert answer.choices[0].text == "a"
    assert answer.num_completion_tokens == 1 + num_bytes


def test_choices_are_kept_apart_and_counted_together() -> None:
    answer = completion(num_choices=2, stops=("fox",))
    first, second = tokens("the fox and on"), tokens("a dog", STOP, index=1)
    _, generation = play(answer, [*first[:2], *second[:2], *first[2:], *second[2:]])
    whole = answer.whole()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert (texts, generation.cancels) == (["the ", "a dog"], [0])
    assert whole["usage"]["prompt_tokens"] == 15
    num_second = len(TOKENIZER.encode("a dog").ids)
    num_first = answer.choices[0].num_tokens
    assert 0 < num_first < len(first)
    assert whole["usage"]["completion_tokens"] == num_first + num_second


def test_no_tokens_asked_for_is_an_empty_answer_ended_by_length() -> None:
    answer = completion(num_choices=2)
    assert list(answer.run(None)) == [Delta(0, (), "length"), Delta(1, (), "length")]
    assert answer.usage()["completion_tokens"] == 0


def test_silence_is_told() -> None:
    answer = completion()
    deltas, _ = play(answer, [None, None, *tokens("a", STOP)])
    assert deltas[:2] == [None, None]


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (HostUnavailable("gone"), HostUnavailable),
        ((1, TokenOutput(1, [], FinishReason.ERROR, error="boom")), EngineError),
        ((1, TokenOutput(1, [], FinishReason.CANCELLED)), HostUnavailable),
    ],
)
def test_an_engine_s_failure_ends_all_choices(event: Any, error: type[Exception]) -> None:
    answer, generation = completion(num_choices=2), ScriptedGeneration([event], 2)
    with pytest.raises(error):
        list(answer.run(generation))
    assert generation.finished and not answer.finished
    assert answer.unfinished_reason == "error"


def test_a_cancel_from_outside_ends_the_answer() -> None:
    answer, generation = completion(), ScriptedGeneration(tokens("a"))
    deltas = answer.run(generation)
    assert next(deltas) == Delta(0, (Content("a"),))
    generation.cancel()
    with pytest.raises(ClientGone):
        next(deltas)
    assert answer.unfinished_reason == "cancelled"


def test_closing_an_unfinished_answer_cancels_and_a_finished_one_does_not() -> None:
    for script, cancels in [(tokens("ab"), [None]), (tokens("a", STOP), [])]:
        generation = ScriptedGeneration(script)
        deltas = completion().run(generation)
        next(deltas)
        if not cancels:
            list(deltas)
        deltas.close()
        assert generation.cancels == cancels


def test_moments_are_read_from_the_clock() -> None:
    moments = [1.0, 1.5, *(2.5 + i for i in range(len(tokens("the dog"))))]
    ticks = iter([*moments, 99.0])
    answer, gaps = completion(clock=lambda: next(ticks)), list[float]()
    answer.on_gap = gaps.append
    play(answer, tokens("the dog", STOP))
    assert (answer.started_s, answer.first_token_s, answer.finished_s) == (1.0, 2.5, 99.0)
    assert answer.submitted_s == 1.5
    assert gaps == [1.0] * (len(moments) - 3)


def test_content_alone_is_told_as_any_chunk_is() -> None:
    texts = ["a", ' "quoted" \\ ', "\n\t\x00", "é 你 🙂", '"content":""', ""]
    for answer in (completion(2), completion(include_usage=True), completion(fingerprint="fp_1")):
        for index, text in enumerate(texts):
            delta = Delta(index % len(answer.choices), (Content(text),))
            assert answer.told_at_once(delta) == answer.framing.events(answer.told(delta))
    others = [
        (completion(), Delta(0, (Content("a"), Content("b")))),
        (completion(), Delta(0, (Content("a"),), "stop")),
        (completion(), Delta(0, (Reasoning("a"),))),
        (completion(), Delta(0)),
        (completion(num_logprobs=0), Delta(0, (Content("a"),))),
        (completion(continuous_usage=True), Delta(0, (Content("a"),))),
    ]
    assert [answer.told_at_once(delta) for answer, delta in others] == [None] * len(others)
