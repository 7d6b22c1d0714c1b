"""A choice cuts text, logprobs and calls together, however its tokens arrive."""

from __future__ import annotations

from typing import Any

import pytest

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.request import FinishReason, Refusal, TokenOutput
from enginehouse.server.answer.choice import Endings
from enginehouse.server.answer.completion import Completion
from enginehouse.server.text.answer import Content, Part, Reasoning, ToolArguments, ToolCallStart
from makers.completions import completion, play
from makers.token_outputs import END_ID, LENGTH, STOP, bytes_ids, scored, tokens


def told(answer: Completion) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = answer.whole()["choices"][0]["logprobs"]["content"]
    return content


def test_the_bytes_of_split_characters_join_to_the_text() -> None:
    answer = completion(num_logprobs=2)
    play(answer, [scored([i]) for i in bytes_ids("a🙂é")] + [(0, TokenOutput(1, [], STOP))])
    items = told(answer)
    assert b"".join(bytes(item["bytes"]) for item in items).decode() == "a🙂é"
    assert [item["token"] for item in items] == ["a", *"\ufffd" * 6]
    first = items[0]
    assert first["logprob"] == -bytes_ids("a")[0] / 100
    assert first["top_logprobs"] == [
        {"token": "a", "logprob": first["logprob"], "bytes": [97]},
        {"token": "<|im_end|>", "logprob": -9999.0, "bytes": None},
    ]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("step", [1, 2, 9])
def test_logprobs_are_cut_where_the_text_is(keep: bool, step: int) -> None:
    ids = bytes_ids("ab🙂stop more")
    script = [scored(ids[i : i + step]) for i in range(0, len(ids), step)]
    answer = completion(endings=Endings(("stop",), keep), num_logprobs=0)
    deltas, generation = play(answer, script)
    data = b"".join(bytes(item["bytes"]) for item in told(answer))
    text = "ab🙂stop" if keep else "ab🙂"
    assert (data.decode(), answer.choices[0].text) == (text, text)
    assert answer.choices[0].stop_reason == "stop"
    assert generation.cancels == [0]
    streamed = [
        item
        for delta in deltas
        if delta is not None
        for chunk in answer.told(delta)
        if chunk["choices"][0]["logprobs"]
        for item in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == told(answer)


def test_a_choice_cut_within_a_character_tells_all_its_tokens() -> None:
    half = bytes_ids("a🙂")[:3]
    answer = completion(num_logprobs=0)
    play(answer, [scored(half, LENGTH)])
    assert [item["bytes"] for item in told(answer)] == [[97], [0xF0], [0x9F]]


def test_logprobs_that_the_engine_does_not_send_are_no_answer() -> None:
    with pytest.raises(EngineError, match="0 logprobs for 1 tokens"):
        play(completion(num_logprobs=0), tokens("a", STOP))


def test_the_best_of_several_are_returned_and_all_are_counted() -> None:
    answer = completion(num_sequences=3, num_returned=2)
    texts = ["zz", "aa", "mm"]  # a lower id is likelier
    script = [scored(bytes_ids(text), STOP, index) for index, text in enumerate(texts)]
    generation_script = [*script]
    play(answer, generation_script)
    choices = answer.whole()["choices"]
    told_texts = [(choice["index"], choice["message"]["content"]) for choice in choices]
    assert told_texts == [(0, "aa"), (1, "mm")]
    assert answer.usage()["completion_tokens"] == 6
    assert choices[0]["logprobs"] is None, "they were not asked for"


@pytest.mark.parametrize(("token_id", "reason"), [(7, 7), (END_ID, None), (None, None)])
def test_a_stop_token_is_told_when_the_client_named_it(
    token_id: int | None, reason: int | None
) -> None:
    answer = completion(endings=Endings(token_ids=frozenset({7})))
    play(answer, [(0, TokenOutput(1, bytes_ids("a"), STOP, stop_token_id=token_id))])
    choice = answer.whole()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)


def test_no_stop_string_ends_a_choice_before_min_tokens() -> None:
    answer = completion(endings=Endings(("b",), min_tokens=3))
    play(answer, [(0, TokenOutput(1, bytes_ids("abcdbe")))])
    assert answer.choices[0].text == "abcd"


def test_cached_tokens_are_those_that_every_sequence_found() -> None:
    answer = completion(num_choices=2)
    play(
        answer,
        [
            (0, TokenOutput(1, [], STOP, num_cached_tokens=8)),
            (1, TokenOutput(2, [], STOP, num_cached_tokens=14)),
        ],
    )
    assert answer.usage()["prompt_tokens_details"] == {"cached_tokens": 8}


def test_what_the_engine_refuses_is_the_sender_s_fault() -> None:
    refusal = Refusal("guided_regex: too large; wanted less", "guided_regex", "invalid_grammar")
    script = [(0, TokenOutput(1, [], FinishReason.ERROR, refusal=refusal))]
    with pytest.raises(RequestError) as caught:
        play(completion(), script)
    assert (caught.value.param, caught.value.code) == ("guided_regex", "invalid_grammar")


class MarkParser:
    """`(thought)` is reasoning, `[name{...}]` a call; all in one pass, for tests."""

    num_failed = 0
    thinks = False

    def __init__(self) -> None:
        self._state, self._name, self._count = "text", "", 0

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        for char in text:
            if self._state == "text" and char in "([":
                self._state = "thought" if char == "(" else "name"
            elif (self._state, char) in (("thought", ")"), ("arguments", "]")):
                self._state = "text"
            elif self._state == "thought":
                parts.append(Reasoning(char))
            elif self._state == "name" and char != "{":
                self._name += char
            elif self._state == "name":
                parts += [
                    ToolCallStart(self._count, f"call_{self._count}", self._name),
                    ToolArguments(self._count, char),
                ]
                self._state, self._name, self._count = "arguments", "", self._count + 1
            elif self._state == "arguments":
                parts.append(ToolArguments(self._count - 1, char))
            else:
                parts.append(Content(char))
        return parts

    def flush(self) -> list[Part]:
        return [Content("!")] if self._state == "thought" else []


def call(number: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


@pytest.mark.parametrize("step", [1, 3, 40])
def test_calls_and_reasoning_are_told_apart_from_content(step: int) -> None:
    answer = completion(make_parser=MarkParser)
    ids = bytes_ids('(hm)[f{"a": 1}][g{}]')
    script: list[Any] = [(0, TokenOutput(1, ids[i : i + step])) for i in range(0, len(ids), step)]
    deltas, _ = play(answer, [*script, (0, TokenOutput(1, [], STOP))])
    [choice] = answer.whole()["choices"]
    calls = [call(0, "f", '{"a": 1}'), call(1, "g", "{}")]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "reasoning_content": "hm",
        "tool_calls": calls,
    }
    assert joined([c for d in deltas if d is not None for c in answer.told(d)]) == {
        "reasoning_content": "hm",
        "tool_calls": calls,
        "finish_reason": "tool_calls",
    }


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of the deltas: the id, type and name come once and first."""
    made: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        for key in ("content", "reasoning_content"):
            if key in delta:
                made[key] = made.get(key, "") + delta[key]
        for item in delta.get("tool_calls", []):
            index, function = item["index"], item["function"]
            if "id" in item:
                assert index not in calls and function["arguments"] == ""
                calls[index] = {key: item[key] for key in ("id", "type", "function")}
            else:
                assert set(function) == {"arguments"}
                calls[index]["function"]["arguments"] += function["arguments"]
        if choice["finish_reason"] is not None:
            made["finish_reason"] = choice["finish_reason"]
    return {**made, "tool_calls": list(calls.values())}


def test_a_call_that_the_limit_cut_is_ended_by_length_and_the_parser_is_flushed() -> None:
    answer = completion(make_parser=MarkParser)
    play(answer, [(0, TokenOutput(1, bytes_ids("[f{}] (hm"), LENGTH))])
    [choice] = answer.whole()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == " !"
    assert choice["message"]["tool_calls"] == [call(0, "f", "{}")]


def test_continuous_usage_is_in_every_chunk() -> None:
    answer = completion(continuous_usage=True, include_usage=True)
    counts = []
    generation_script = [(0, TokenOutput(1, [i])) for i in bytes_ids("abc")]
    from doubles.scripted_client import ScriptedGeneration

    generation = ScriptedGeneration([*generation_script, (0, TokenOutput(1, [], STOP))])
    for delta in answer.run(generation):
        assert delta is not None
        counts += [chunk["usage"]["completion_tokens"] for chunk in answer.told(delta)]
    assert counts == [1, 2, 3, 3]
