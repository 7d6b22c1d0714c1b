"""Arguments between tags of their own are read by the function's schema, and held to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.support import installed
from enginehouse.server.formats.typed_arguments import json_of
from enginehouse.server.formats.xml import Qwen3Coder
from enginehouse.server.text.answer import Content, Part, ToolArguments, ToolCallStart
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.tag_matching import allows
from makers.tool_texts import CUTS, XML_FORMATS, calls_of, content_of, feed, is_json, split

EVERY_FORMAT = pytest.mark.parametrize("form", XML_FORMATS.values(), ids=XML_FORMATS)
TYPES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "s": (
        {"type": "string"},
        st.sampled_from(["", "5", "null", '"x"', "\n a\n\n", "<b>", "x</p>", "a\\n", "é🙂"])
        | st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=9),
    ),
    "i": ({"type": "integer"}, st.integers()),
    "n": ({"type": ["number", "null"]}, st.floats(allow_nan=False, allow_infinity=False)),
    "b": ({"$ref": "#/$defs/flag"}, st.booleans() | st.none()),
    "l": ({"type": "array"}, st.lists(st.integers() | st.text(max_size=3), max_size=3)),
    "o": ({"properties": {}}, st.dictionaries(st.text(max_size=3), st.booleans(), max_size=2)),
    "u": (
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        st.integers() | st.sampled_from(["abc", "1 2", "true", ""]),
    ),
    "e": ({"enum": ["up", "3 4", 7]}, st.sampled_from(["up", "3 4", 7])),
}
FLAG = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
SCHEMA = {
    "type": "object",
    "properties": {name: schema for name, (schema, _) in TYPES.items()},
    "$defs": {"flag": FLAG},
}
FUNCTIONS = (ToolFunction("f", "", SCHEMA), ToolFunction("a.b-c", "", SCHEMA), ToolFunction("g"))
ARGUMENTS = st.fixed_dictionaries({}, optional={name: each for name, (_, each) in TYPES.items()})
CALL = st.builds(ToolCall, st.just(""), st.sampled_from(["f", "a.b-c"]), ARGUMENTS)
CALLS = st.lists(CALL | st.just(ToolCall("", "g", {})), min_size=1, max_size=3)


def read(form: Format, pieces: list[str]) -> tuple[list[Part], int]:
    parser = form.reader(FUNCTIONS)
    return feed(parser, pieces), parser.num_failed


@EVERY_FORMAT
@given(calls=CALLS, cuts=CUTS, end=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_calls_are_read_with_the_types_of_their_schema_whatever_the_split(
    form: Format, calls: list[ToolCall], cuts: list[int], end: int
) -> None:
    text = form.call_text(calls)
    whole = [(call.name, dict(call.arguments)) for call in calls]
    parts, num_failed = read(form, split(f"So:\n{text}\nDone.", cuts))
    assert (calls_of(parts), num_failed, content_of(parts)) == (whole, 0, "So:\nDone.")
    cut = text[: end % (len(text) + 1)]
    parts, _ = read(form, [cut])
    assert read(form, list(cut))[0] == parts
    given_now = [part.text for part in parts if isinstance(part, ToolArguments)]
    for text, (_, arguments) in zip(given_now, whole, strict=False):
        assert json.loads(text) == arguments if is_json(text) else text == given_now[-1]


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=s>", "\n", "x"),
        *("</parameter>", "<seed:tool_call>", "</seed:tool_call>", "<minimax:tool_call>", " ", "<"),
        *('<invoke name="f">', "</invoke>", '<parameter name="s">', "</minimax:tool_call>", "f\n"),
        *("<arg_key>s</arg_key>", "<arg_value>", "</arg_value>", "<arg_key>", "f", "g", "é", "</"),
    ]
)


@EVERY_FORMAT
@given(fragments=st.lists(FRAGMENTS, max_size=14), cuts=CUTS)
@settings(max_examples=100, deadline=None)
def test_any_text_gives_the_same_parts_in_pieces_of_any_size(
    form: Format, fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    whole = read(form, [text])
    assert read(form, split(text, cuts)) == whole
    assert read(form, list(text)) == whole
    nobody = feed(form.reader((ToolFunction("nobody"),)), [text])
    assert content_of(nobody) == text and len(nobody) <= 1


START = ToolCallStart(0, "", "f")
READINGS: list[tuple[str, str, list[Part], int]] = [
    (  # tags on one line, and nothing behind the function
        "qwen3_coder",
        "<tool_call><function=f><parameter=i>3</parameter></function> so",
        [START, ToolArguments(0, '{"i": 3}'), Content(" so")],
        0,
    ),
    (
        "glm45",
        "<tool_call>f<arg_key>s</arg_key><arg_value>3</arg_value></tool_call>",
        [START, ToolArguments(0, '{"s": "3"}')],
        0,
    ),
    (
        "minimax_m2",
        '<minimax:tool_call><invoke name="f"></invoke><invoke name="g"></invoke>',
        [START, ToolArguments(0, "{}"), ToolCallStart(1, "", "g"), ToolArguments(1, "{}")],
        0,
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=nobody>\n</function>\n</tool_call>",
        [Content("<tool_call>\n<function=nobody>\n</function>\n</tool_call>")],
        1,
    ),
    (
        "qwen3_coder",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        [Content('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')],
        1,
    ),
    (  # an argument twice
        "seed_oss",
        "<seed:tool_call><function=f><parameter=i>3</parameter><parameter=i>4</parameter>",
        [START, ToolArguments(0, '{"i": 3'), Content("<parameter=i>4</parameter>")],
        1,
    ),
]


@pytest.mark.parametrize(("form", "text", "parts", "num_failed"), READINGS)
def test_how_a_text_is_read(form: str, text: str, parts: list[Part], num_failed: int) -> None:
    assert read(XML_FORMATS[form], [text]) == (parts, num_failed)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5", {}, 5),
        ("5", {"type": ["string", "null"]}, "5"),
        ("null", {"type": ["string", "null"]}, None),
        ("True", {"type": "boolean"}, True),  # as Python writes it
        ("{'a': [None]}", {"type": "object"}, {"a": [None]}),
        ("{'a'}", {"type": "object"}, "{'a'}"),
        ('"x"', True, '"x"'),
        ("x", {"type": "integer"}, "x"),  # what is of no type that is allowed is seen as it is
        ("01", {}, "01"),
        ("1e999", {"type": "string"}, "1e999"),
        ("2.0", {"type": "integer"}, 2.0),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ("9" * 500, {"type": "integer"}, "9" * 500),
        ("a", {"$ref": "#/$defs/nowhere"}, "a"),
    ],
)
def test_what_json_a_bare_text_is(text: str, schema: Any, value: Any) -> None:
    assert json.loads(json_of(text, schema, {"$defs": {}})) == value


def test_schemas_that_lead_in_circles_or_branch_without_end_cost_little() -> None:
    names = [f"a{number}" for number in range(60)]
    defs: dict[str, Any] = {
        name: {"anyOf": [{"$ref": f"#/$defs/{after}"}, {"$ref": f"#/$defs/{after}"}]}
        for name, after in zip(names, names[1:], strict=False)
    }
    defs["a59"] = {"anyOf": [{"$ref": "#/$defs/a0"}, {"type": "integer"}]}
    for schema in ({"$ref": "#/$defs/a0"}, {"$ref": "#/$defs/a59"}, {"$ref": "#/$defs/none"}):
        assert json_of("5", schema, {"$defs": defs}) == "5"
    function = ToolFunction("f", "", {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": defs})
    form = Qwen3Coder()
    text = form.call_text([ToolCall("", "f", {"x": 5})])
    assert calls_of(feed(form.reader([function]), [text])) == [("f", {"x": 5})]
    nested: Any = {"type": "integer"}
    for _ in range(300):
        nested = {"anyOf": [nested]}
    assert json_of("5", nested, {}) == "5"


HELD = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]*$"},
        "day": {"type": "string", "format": "date"},
        "note": {"type": "string"},
        "kind": {"enum": ["a b", 3]},
        "size": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^x+$"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/item"}},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"item": {"type": "integer"}},
}
TAKEN: list[dict[str, Any]] = [
    {"city": "Paris"},
    {"city": "Paris", "day": "2024-02-28", "note": 'a <b> "c"\nd', "kind": "a b"},
    {"city": "Rome", "kind": 3, "size": 4, "list": [1, 2]},
    {"city": "Rome", "size": "xx"},
]
NOT_TAKEN: list[dict[str, Any]] = [
    {},
    {"note": "x"},
    {"city": "paris"},
    {"city": "Paris", "day": "2024-02-31"},
    {"city": "Paris", "kind": "3 "},
    {"city": "Paris", "size": "y"},
    {"city": "Paris", "list": ["x"]},
    {"city": "Paris", "more": 1},
]


@EVERY_FORMAT
def test_a_forced_call_is_held_to_the_schema_of_each_argument(form: Format) -> None:
    use = ToolUse((ToolFunction("f", "", HELD, strict=True),), "required")
    tag = use.tag(form)
    for arguments in TAKEN:
        text = form.call_text([ToolCall("", "f", arguments)])
        assert allows(tag, text), text
        assert calls_of(feed(use.parser(form), [text])) == [("f", arguments)]
    for arguments in NOT_TAKEN:
        text = form.call_text([ToolCall("", "f", arguments)])
        assert not allows(tag, text), text


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "object"}, [{}, {"a": "<i>x</i>", "b": 1}], []),
        ({"type": "object", "minProperties": 1}, [{"a": "x"}], [{}]),
        ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
        (
            {"anyOf": [HELD, {"properties": {"id": {"type": "integer"}}, "required": ["id"]}]},
            [{"id": 3}, {"city": "Rome"}],
            [{"id": "x"}, {}],
        ),
        ({"enum": [{"a": 1}, {"b": "x"}]}, [{"a": 1}, {"b": "x"}], [{"a": 2}]),
    ],
    ids=["any", "some", "none", "either", "listed"],
)
def test_whatever_schema_a_function_has_is_followed(
    schema: dict[str, Any], taken: list[dict[str, Any]], refused: list[dict[str, Any]]
) -> None:
    form = Qwen3Coder()
    tag = ToolUse((ToolFunction("f", "", {**schema, "$defs": HELD["$defs"]}),), "required").tag(
        form
    )
    for wanted, examples in ((True, taken), (False, refused)):
        for arguments in examples:
            assert allows(tag, form.call_text([ToolCall("", "f", arguments)])) == wanted, arguments


def test_the_length_of_a_string_is_held_where_xgrammar_can() -> None:
    form, schema = Qwen3Coder(), {"type": "string", "minLength": 2, "maxLength": 3}
    tag = ToolUse((ToolFunction("f", "", {"properties": {"a": schema}}),), "required").tag(form)
    if not installed().has("maxLength"):
        with pytest.raises(RequestError, match="needs xgrammar"):
            allows(tag, "")
        return
    for text in ("", "a", "ab", "é<b", "abcd"):
        call = form.call_text([ToolCall("", "f", {"a": text})])
        assert allows(tag, call) == (2 <= len(text) <= 3), text


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        ({"type": "object", "maxProperties": 2}, "maxProperties"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "additionalProperties"),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, "minProperties"),
    ],
)
def test_what_cannot_be_held_of_arguments_is_refused_by_name(
    schema: dict[str, Any], key: str
) -> None:
    with pytest.raises(RequestError, match=f"a function has {key}, which"):
        ToolUse((ToolFunction("f", "", schema),), "required").tag(Qwen3Coder())
