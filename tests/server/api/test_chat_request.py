from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.runtime.errors import RequestError
from enginehouse.server.api.chat.request import parse_chat_request
from enginehouse.server.wire.refused_fields import UNSUPPORTED_IN_CHAT
from enginehouse.server.wire.shapes import SEED_LIMIT

HELLO = {"role": "user", "content": "Hello!"}
TOOL = {"role": "tool", "content": "4"}
NAN = float("nan")


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [HELLO], **fields}).encode()


def refusal(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat_request(data)
    assert caught.value.status == 400
    return caught.value


def messages(*items: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in items]


def test_the_defaults_are_the_page_s() -> None:
    request = parse_chat_request(body())
    [sampling] = request.samplings(7)
    fields = request.fields
    assert not fields.stream and not request.include_usage and request.max_tokens is None
    assert (fields.n, fields.stop, fields.user, request.ignored_fields) == (1, [], None, ())
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert (sampling.repetition_penalty, sampling.seed, sampling.max_tokens) == (1, None, 7)


NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {  # field: legal values, values out of range
    "temperature": ([0, 2, 0.7], [-0.1, 3]),
    "top_p": ([0.001, 1], [0, 1.01, -1]),
    "min_p": ([0, 1, 0.5], [-0.01, 1.5]),
    "top_k": ([-1, 0, 999], [-2, 1000]),
    "max_tokens": ([0, 1_000_000], [-1, 1_000_001]),
    "max_completion_tokens": ([0, 1_000_000], [-1, 1_000_001]),
    "n": ([1, 4], [0, 5]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "repetition_penalty": ([0.01, 5], [0, 0.009, 5.1]),
    "seed": ([0, 2**63, SEED_LIMIT - 1], [-1, SEED_LIMIT, 10**30]),
}
INTEGERS = {"top_k", "max_tokens", "max_completion_tokens", "n", "seed"}


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_is_taken_in_its_range_only(field: str) -> None:
    legal, illegal = NUMBERS[field]
    for value in legal:
        parse_chat_request(body(**{field: value}))
    for value in illegal:
        error = refusal(body(**{field: value}))
        assert (error.param, error.code) == (field, "invalid_value")
        assert f"{field}: {value} is out of range; wanted " in error.message


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_is_never_guessed_from_something_else(field: str) -> None:
    parse_chat_request(body(**{field: None}))
    for value in ["1", True, [], {}, *([1.0] if field in INTEGERS else [])]:
        error = refusal(body(**{field: value}))
        assert (error.param, error.code) == (field, "invalid_type")
    assert refusal(body(**{field: NAN})).code == "invalid_json"


def test_a_range_is_stated_in_words() -> None:
    message = "temperature: 3 is out of range; wanted 0 <= temperature <= 2"
    assert refusal(body(temperature=3)).message == message


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
CALLED = "messages[1].tool_calls[0].function"


def called(arguments: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


REFUSED: list[tuple[dict[str, Any], str, str]] = [  # fields, param, code
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": [5] * 100}, "messages[0]", "invalid_type"),
    ({"messages": messages(("bot", "x"))}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": ["user"]}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    (
        {"messages": messages(("user", None))},
        "messages[0].content",
        "missing_required_parameter",
    ),
    ({"messages": messages(("user", 5))}, "messages[0].content", "invalid_type"),
    (
        {"messages": messages(("user", "a"), ("user", [{"type": "text", "text": "b"}, IMAGE]))},
        "messages[1].content[1].type",
        "invalid_value",
    ),
    (
        {"messages": messages(("user", [{"type": "text"}]))},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        {"messages": messages(("user", "a"), ("tool", "b"))},
        "messages[1].tool_call_id",
        "missing_required_parameter",
    ),
    (
        {"messages": [HELLO, {"role": "assistant", "tool_calls": [{}]}, HELLO]},
        "messages[1].tool_calls[0].id",
        "missing_required_parameter",
    ),
    (
        {"messages": [{**called("{}"), "role": "user"}]},
        "messages[0].tool_calls",
        "invalid_value",
    ),
    ({"messages": [{**HELLO, "tool_call_id": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
    (
        {"messages": [HELLO, {"role": "assistant", "content": "", "function_call": {}}, HELLO]},
        "messages[1].function_call.name",
        "missing_required_parameter",
    ),
    ({"stream": "true"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "invalid_type",
    ),
    ({"stream": True, "stream_options": 1}, "stream_options", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", "b", "c", ""]}, "stop[3]", "invalid_value"),
    ({"stop": ["a", None]}, "stop[1]", "invalid_type"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"user": 7}, "user", "invalid_type"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "invalid_value"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "invalid_value"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "invalid_value",
    ),
    ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"),
    ({"tool_choice": ["auto"]}, "tool_choice", "invalid_value"),
    ({"guided_regex": "a", "response_format": SCHEMA}, "guided_regex", "invalid_value"),
    ({"foo": 1, "strict_fields": True}, "foo", "unknown_parameter"),
    (
        {"messages": [{**HELLO, "mood": 1}], "strict_fields": True},
        "messages[0].mood",
        "unknown_parameter",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": "json"}, "response_format", "invalid_type"),
    ({"metadata": 1}, "metadata", "invalid_type"),
    *(({field: {"x": 1}}, field, "unsupported_parameter") for field in UNSUPPORTED_IN_CHAT),
    ({"logprobs": 0}, "logprobs", "invalid_type"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "invalid_value",
    ),
    ({"n": 2, "best_of": 1}, "best_of", "invalid_value"),
    ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "invalid_value"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "invalid_value"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "invalid_value"),
    ({"logit_bias": {"7": "1"}}, "logit_bias.7", "invalid_type"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refusal_names_the_field_at_fault(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(body(**fields))
    assert (error.param, error.code) == (param, code)
    assert error.message.startswith(param)


ACCEPTED: list[dict[str, Any]] = [
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tools": [FUNCTION], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [FUNCTION], "tool_choice": FUNCTION},
    {"response_format": {"type": "text"}},
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"store": False, "service_tier": "default", "parallel_tool_calls": False},
    {"web_search_options": None, "parallel_tool_calls": None, "tool_choice": None, "top_k": None},
    {"messages": messages(("user", []), ("assistant", None), ("system", "c"), ("assistant", "b"))},
    {"messages": messages(("system", "a"))},
    {"user": "u", "stop": None, "seed": None, "stream_options": None},
    {"stop": ["a"] * 16},
    {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "modalities": ["text"]},
    {"messages": messages(("user", "a"), ("assistant", ""), ("user", ""), ("system", "s"))},
    {"messages": [HELLO, {"role": "tool", "content": "4", "tool_call_id": "c"}]},
    {"messages": [{**HELLO, "name": "bob", "tool_calls": None}]},
    {"messages": [HELLO, called('{"a": [1]}'), {**TOOL, "tool_call_id": "c"}]},
    {"messages": [HELLO, {"role": "assistant", "content": "a"}], "continue_final_message": True},
    {"messages": [HELLO, {"role": "assistant", "content": "a"}], "add_generation_prompt": False},
    {"logprobs": True, "top_logprobs": 20},
    {"logit_bias": {"7": -100, "8": 100.0}, "stop_token_ids": [0, 7]},
    {"n": 2, "best_of": 3},
    {"n": 2, "best_of": 2, "stream": True, "stream_options": {"continuous_usage_stats": True}},
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda value: str(value)[:40])
def test_what_asks_for_nothing_we_lack_is_taken(fields: dict[str, Any]) -> None:
    assert parse_chat_request(body(**fields)).ignored_fields == ()


OTHER_ARGUMENTS: list[tuple[Any, dict[str, Any], str | None]] = [  # arguments, object, left as text
    ("", {}, None),
    (None, {}, None),
    ("{}", {}, None),
    ("null", {}, None),
    (" \n", {}, None),
    ({"a": 1}, {"a": 1}, None),
    ('{"a": 1', {}, '{"a": 1'),
    ('{"a": "b" c"}', {}, '{"a": "b" c"}'),
    ("[1]", {}, "[1]"),
    ([], {}, "[]"),
    (5, {}, "5"),
    ("[" * 100_000, {}, "[" * 100_000),
]


@pytest.mark.parametrize(
    ("given", "wanted", "unread"), OTHER_ARGUMENTS, ids=lambda value: str(value)[:20]
)
def test_a_conversation_goes_on_whatever_a_call_in_it_was(
    given: Any, wanted: dict[str, Any], unread: str | None
) -> None:
    request = parse_chat_request(body(messages=[HELLO, called(given), HELLO]))
    [call] = request.messages[1].tool_calls
    assert (call.arguments, call.unread) == (wanted, unread)
    assert request.repaired == (() if unread is None else (f"{CALLED}.arguments",))


def test_the_older_form_of_a_call_and_its_answer_are_read() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    answer = {"role": "function", "name": "f", "content": "4"}
    _, made, result = parse_chat_request(body(messages=[HELLO, older, answer])).messages
    assert [(call.name, call.arguments) for call in made.tool_calls] == [("f", {})]
    assert (result.role, result.tool_call_id) == ("tool", made.tool_calls[0].id)


def test_a_refusal_and_reasoning_under_either_name_are_read() -> None:
    said = [
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "no", "refusal": None, "reasoning": "why"},
        {"role": "assistant", "content": "no", "reasoning_content": "why", "annotations": []},
    ]
    request = parse_chat_request(body(messages=[HELLO, *said, HELLO]))
    assert [item.content for item in request.messages[1:-1]] == ["no"] * 4
    assert [item.reasoning_content for item in request.messages[3:5]] == ["why", "why"]


def test_a_prefix_is_continued_as_mistral_has_it() -> None:
    begun = {"role": "assistant", "content": "a", "prefix": True}
    options = parse_chat_request(body(messages=[HELLO, begun])).options
    assert (options.continue_final_message, options.add_generation_prompt) == (True, False)
    assert refusal(body(messages=[HELLO, begun, HELLO])).param == "messages[1].prefix"
    plain = parse_chat_request(body(messages=[HELLO, {**begun, "prefix": False}])).options
    assert (plain.continue_final_message, plain.add_generation_prompt) == (False, True)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_parts_that_are_no_text_are_refused_in_one_sentence(kind: str) -> None:
    error = refusal(body(messages=messages(("user", [{"type": kind, kind: {}}]))))
    assert error.param == "messages[0].content[0].type"
    assert "this engine reads text only" in error.message


BAD_JSON = [
    b"",
    b"{",
    b"\x00",
    b'{"a": "\xff"}',
    b'{"a": "\\ud800 half"}',
    b'{"a": "\\udc00 half"}',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1e999}',
    b'{"a": ' + b"1" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"{} {}",
]


@pytest.mark.parametrize("data", BAD_JSON, ids=lambda data: repr(data[:12]))
def test_a_body_that_is_no_json_is_refused(data: bytes) -> None:
    assert refusal(data).code == "invalid_json"


@pytest.mark.parametrize("data", [b"null", b"[]", b"5", b'"x"', b"true"])
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    assert refusal(data).code == "invalid_type"


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"model": "m", "messages": [], "model": "m"}', "model"),
        ('{"a": [{"b": {"c": 1, "d": 2, "c": 1}}]}', "a[0].b.c"),
        ('{"a": 1, "a": {"b": 1, "b": 2}}', "a"),
    ],
)
def test_a_key_that_stands_twice_is_refused_and_named(text: str, param: str) -> None:
    error = refusal(text.encode())
    assert (error.param, error.code) == (param, "duplicate_key")


def test_replayed_calls_reach_the_template_with_arguments_as_an_object() -> None:
    request = parse_chat_request(body(messages=[HELLO, called('{"a": [1]}'), HELLO]))
    assert request.messages[1].to_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
        ],
    }


def test_text_parts_are_joined_by_line_breaks_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat_request(body(messages=messages(("developer", "s"), ("user", parts))))
    assert [(item.role, item.content) for item in request.messages] == [
        ("system", "s"),
        ("user", "a\nb"),
    ]


def test_unknown_fields_are_reported_once_by_name() -> None:
    request = parse_chat_request(
        body(
            messages=[
                {**HELLO, "mood": 1},
                {"role": "user", "content": [{"type": "text", "text": "a", "tint": 3}]},
            ],
            foo=1,
            stream=True,
            stream_options={"bar": 2},
        )
    )
    assert request.ignored_fields == (
        "foo",
        "stream_options.bar",
        "messages[].mood",
        "messages[].content[].tint",
    )


def test_choices_of_a_seeded_request_differ_and_seeds_stay_in_63_bits() -> None:
    seeds = [item.seed for item in parse_chat_request(body(seed=2**63 - 1, n=3)).samplings(1)]
    assert seeds == [2**63 - 1, 0, 1]
    assert {item.seed for item in parse_chat_request(body(n=2)).samplings(1)} == {None}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [*NUMBERS, "messages", "stop", "tools", "tool_choice", "response_format", "user", "stream"]


@settings(max_examples=60, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(FIELDS + ["stream_options", "logprobs"]), JSON, max_size=3))
def test_whatever_the_body_it_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        parse_chat_request(body(**fields))
    except RequestError as error:
        assert error.status == 400
