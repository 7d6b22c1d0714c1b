"""Calls are read out of text, however it is split, and what is no call stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from enginehouse.server.text.answer import Content, Part, ToolArguments, ToolCallStart
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.json_reader import MAX_DEPTH, object_text
from enginehouse.server.tools.tool_choice import ToolUse
from makers.tool_texts import CUTS, FORMATS, NAMES, calls_of, content_of, feed, is_json, split

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
SCALARS |= st.sampled_from(['}"', "\\", "</tool_call>", "[TOOL_CALLS][", '"}]', "é🙂\n\t", "'\")"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "city"]), VALUES)
CALLS = st.lists(
    st.builds(ToolCall, st.just(""), st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3
)
WORDS = st.text(st.sampled_from("abc é.,:!\n🙂"), max_size=12).map(lambda text: f"{text}x")
# Their parsers are those of deepseek_v3, granite, hunyuan and mistral, nemotron's but for the tags.
ALIKE = ("deepseek_v31", "phi4_mini", "hunyuan_list", "mistral_spaced", "nemotron")
TRIED = {name: form for name, form in FORMATS.items() if name not in ALIKE}
EVERY_FORMAT = pytest.mark.parametrize("form", TRIED.values(), ids=TRIED)

# What adversarial text is made of: every mark of every format, whole and in part.
FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[TOOL_"),
        *("<|python_tag|>", "<|python_start|>", "<|python_end|>", "<|pyth", ";", ",", "\n", " "),
        *('{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {', "}}", "}", "]"),
        *('{"parameters": {"b": [', '{"name": "nobody", "arguments": {}}', '"id": 3', '"', "\\"),
        *("<|tool_call|>", "<|/tool_call|>", "<|START_ACTION|>", "]<|END_ACTION|>"),
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "f\n```json\n{",
            "```",
        ),
        *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_calls_section_begin|>", ":0"),
        *("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{", "<|tool_call_end|>"),
        *("<|tool_calls_section_end|>", '{"tool_name": "f", "parameters": {}}'),
        *("<tool_calls>", "</tool_calls>", "<tool_call>f\n```json\n{", "<|assistant|>", "\nf\n{}"),
        *("<|tool_call_start|>", "<|tool_call_start|>[f(", "<|tool_call_end|>"),
        *("[", "{", "(", ")", "f(", "g(a=1)", '[f(a="x")', "f", "g", ", b=2", "1.5e3", "null", "-"),
        *(
            '"name"',
            '"arguments": ',
            ": ",
            "text",
            "é",
            "🙂",
            "\x00",
            "\u2028",
            "a=[1, {'k': ')'}]",
        ),
    ]
)


def read(form: Format, pieces: list[str]) -> tuple[list[Part], int]:
    parser = form.parser(NAMES)
    return feed(parser, pieces), parser.num_failed


@EVERY_FORMAT
@given(before=st.none() | WORDS, calls=CALLS, after=st.none() | WORDS, cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_calls_among_text_are_read_whatever_the_split(
    form: Format, before: str | None, calls: list[ToolCall], after: str | None, cuts: list[int]
) -> None:
    text = form.call_text(calls)
    if before is not None:
        text = f"{before}\n{text}"
    if after is not None:
        text += f"\n{after}"
    parts, num_failed = read(form, split(text, cuts))
    assert num_failed == 0
    assert calls_of(parts) == [(call.name, dict(call.arguments)) for call in calls]
    assert content_of(parts) == (before or "") + ("" if after is None else f"\n{after}")
    assert read(form, list(text)) == (parts, 0)


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


@EVERY_FORMAT
@given(before=WORDS, calls=CALLS, end=st.integers(0, 10_000), cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_a_text_cut_anywhere_gives_whole_calls_and_at_most_the_head_of_one_more(
    form: Format, before: str, calls: list[ToolCall], end: int, cuts: list[int]
) -> None:
    text = f"{before}\n{form.call_text(calls)}"
    text = text[: end % (len(text) + 1)]
    parts, num_failed = read(form, split(text, cuts))
    assert read(form, [text]) == (parts, num_failed)
    match parts[-1:]:
        case [ToolCallStart()]:
            parts = parts[:-1]
        case [ToolArguments(text=last)] if not is_json(last):
            assert num_failed == 1
            parts = parts[:-2]
    whole = [(call.name, dict(call.arguments)) for call in calls]
    found = calls_of(parts)
    assert found == whole[: len(found)]


@EVERY_FORMAT
@given(text=st.text(st.characters(exclude_characters="[{<"), max_size=60), cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_text_without_calls_is_content_to_the_letter(
    form: Format, text: str, cuts: list[int]
) -> None:
    assert read(form, split(text, cuts)) == ([Content(text)] if text else [], 0)


@EVERY_FORMAT
@given(fragments=st.lists(FRAGMENTS, max_size=14), cuts=CUTS)
@settings(max_examples=100, deadline=None)
def test_where_no_function_is_known_all_is_content_to_the_letter(
    form: Format, fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    parts = feed(form.parser(()), split(text, cuts))
    assert parts == ([Content(text)] if text else [])


JSON_FRAGMENTS = ["{", "}", "[", "]", ",", ":", '"a"', '"', "\\", "u00e9", "true", "nul", "null"]
JSON_FRAGMENTS += [" ", "\n", "0", "1", "-", ".", "e", "E+", "x", "\x1f", "{}", '{"b":', '"\\n"']
JSON_TEXTS = st.lists(st.sampled_from(JSON_FRAGMENTS), max_size=6).map("".join)


@given(JSON_TEXTS | JSON_TEXTS.map(lambda text: f'{{"a": {text}}}'))
@settings(max_examples=1000, deadline=None)
@example('{"a": 1.}')
@example('{"a": 01}')
@example('{"a": [1, ]}')
@example('{"a": -}')
@example('{"a": "\\x"}')
def test_an_object_is_what_the_json_module_says(text: str) -> None:
    try:
        expected = json.loads(text, strict=False)
    except ValueError:
        expected = None
    found = object_text(text)
    assert (found is not None) == isinstance(expected, dict)
    if found is not None:
        assert json.loads(found) == expected


START = ToolCallStart(0, "", "f")
READINGS: list[tuple[str, str, list[Part], int]] = [
    # arguments under either name, before the function's, as text, null, or left out
    ("json", '{"parameters": {"a": 1}, "name": "f"}', [START, ToolArguments(0, '{"a": 1}')], 0),
    ("hermes", '<tool_call>{"name":"f"}', [START, ToolArguments(0, "{}")], 0),
    ("mistral", '[TOOL_CALLS]{"name":"f","arguments":null}', [START, ToolArguments(0, "{}")], 0),
    (
        "llama3_json",
        '<|python_tag|> {"type": "function", "name": "f", "parameters": "{\\"a\\": [1]}"}',
        [START, ToolArguments(0, '{"a": [1]}')],
        0,
    ),
    # a raw line break in a string is what the model meant by \n
    (
        "json",
        '{"name":"f","arguments":{"a":"1\n2"}}',
        [START, ToolArguments(0, '{"a":"1\\n2"}')],
        0,
    ),
    # one that goes wrong may be followed by one that does not, at once
    (
        "hermes",
        '<tool_call><tool_call>{"name":"f"}</tool_call>',
        [Content("<tool_call>"), START, ToolArguments(0, "{}")],
        1,
    ),
    (
        "llama_pythonic",
        r"""[f(a='\')]', b="\"\\")]""",
        [START, ToolArguments(0, r"""{"a": "')]", "b": "\"\\"}""")],
        0,
    ),
    # not calls: unknown functions, other JSON, a call in the middle of a line
    ("json", '{"name": "Bob", "age": 3}', [Content('{"name": "Bob", "age": 3}')], 1),
    ("json", '{"answer": [1, 2]}', [Content('{"answer": [1, 2]}')], 0),
    ("json", 'so {"name": "f"}', [Content('so {"name": "f"}')], 0),
    ("json", '{"name": "f", "city": "Rome"}', [Content('{"name": "f", "city": "Rome"}')], 1),
    ("json", '{"name": "f", "arguments": [1]}', [Content('{"name": "f", "arguments": [1]}')], 1),
    ("hermes", "<tool_call>now</tool_call>", [Content("<tool_call>now</tool_call>")], 1),
    ("mistral", "[TOOL_CALLS]nobody[ARGS]{}", [Content("[TOOL_CALLS]nobody[ARGS]{}")], 1),
    ("mistral", "[1] a book", [Content("[1] a book")], 0),
    ("llama_pythonic", "[1] [link](url)", [Content("[1] [link](url)")], 0),
    ("llama_pythonic", "[f(1)]", [Content("[f(1)]")], 1),
    ("llama_pythonic", "[f(a=open('x'))]", [Content("[f(a=open('x'))]")], 1),
    ("llama_pythonic", "[f(a=1, a=2)]", [Content("[f(a=1, a=2)]")], 1),
    ("llama_pythonic", "[f(**{'a': 1})]", [Content("[f(**{'a': 1})]")], 1),
    ("llama_pythonic", "[f(a=1e999)]", [Content("[f(a=1e999)]")], 1),
    ("llama_pythonic", "[f(a=-1, b=true)]", [START, ToolArguments(0, '{"a": -1, "b": true}')], 0),
    ("llama_pythonic", r"[f(a='\ud800\d')]", [START, ToolArguments(0, r'{"a": "\ud800\\d"}')], 0),
    ("llama_pythonic", '{"name":"f","parameters":{}}', [START, ToolArguments(0, "{}")], 0),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]9aB[ARGS]{}", [START, ToolArguments(0, "{}")], 0),
    # a call that goes wrong after it began stays begun, and the rest is text
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{"a":oops}} end',
        [START, ToolArguments(0, '{"a":'), Content("oops}} end")],
        1,
    ),
]


@pytest.mark.parametrize(("form", "text", "parts", "num_failed"), READINGS)
def test_how_a_text_is_read(form: str, text: str, parts: list[Part], num_failed: int) -> None:
    assert read(FORMATS[form], [text]) == (parts, num_failed)


@pytest.mark.parametrize("form", ["json", "hermes", "mistral", "llama3_json"])
def test_name_and_arguments_come_as_soon_as_they_are_certain(form: str) -> None:
    parser = FORMATS[form].parser(NAMES)
    text = FORMATS[form].call_text([ToolCall("", "f", {"a": "xyz"})])
    start = text.index('{"a"')
    assert parser.push(text[:start]) == []
    given_now = parser.push('{"a')
    assert isinstance(given_now[0], ToolCallStart)
    assert given_now[1:] == [ToolArguments(0, '{"a')]
    assert parser.push('": "x') == [ToolArguments(0, '": "x')]


@EVERY_FORMAT
def test_a_second_call_is_not_given_where_one_is_the_most(form: Format) -> None:
    text = form.call_text([ToolCall("", "f", {"a": 1}), ToolCall("", "g", {})])
    parts = feed(form.parser(NAMES, max_calls=1), [text])
    assert (calls_of(parts), content_of(parts)) == ([("f", {"a": 1})], "")


@EVERY_FORMAT
@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 20_000])
def test_depth_is_bounded_and_never_an_error(form: Format, depth: int) -> None:
    text = form.call_text([ToolCall("", "f", {"a": "DEEP"})])
    text = text.replace(repr("DEEP"), "[" * depth + "]" * depth)
    text = text.replace('"DEEP"', "[" * depth + "]" * depth)
    parts, num_failed = read(form, [text])
    expected: Any = "[" * depth + "]" * depth
    if depth < MAX_DEPTH:
        assert num_failed == 0
        [start, arguments] = parts
        assert isinstance(arguments, ToolArguments) and expected in arguments.text
    else:
        assert num_failed == 1
        assert content_of(parts)


def test_every_call_has_an_id_of_its_own() -> None:
    parser = FORMATS["json"].parser(NAMES)
    parts = parser.push('{"name": "f"}\n{"name": "f"}')
    ids = {part.id for part in parts if isinstance(part, ToolCallStart)}
    assert len(ids) == 2


LOOSE = [  # format, text, calls, content around them
    ("hermes", '<tool_call>[{"name":"f"}, {"name":"g"}]</tool_call>', ["f", "g"], ""),
    ("hermes", '<tool_call>{"name":"f"}\n{"name":"g"}</tool_call>bye', ["f", "g"], "bye"),
    ("hermes", '<tool_call>{"name":"f"}}</tool_call>', ["f"], ""),
    ("hermes", '<tool_call>{"name":"f"} so', ["f"], " so"),
    ("nemotron", '<TOOLCALL>[{"name":"f"}, {"name":"g"}]</TOOLCALL>', ["f", "g"], ""),
    ("nemotron", 'Well. <TOOLCALL>{"name":"f"}</TOOLCALL> so', ["f"], "Well. so"),
    ("json", '{"name":"f"}}', ["f"], ""),
    ("json", '{"name":"f"}}; {"name":"g"}', ["f", "g"], ""),
    ("llama3_json", '<|python_tag|>{"name":"f"}}\nso', ["f"], "\nso"),
    ("glm4", "f\n{}\nso", ["f"], "so"),
    ("glm4", "\nf \n {}\ng\n{}", ["f", "g"], ""),
    ("glm4", "f\nand g\nare mine", [], "f\nand g\nare mine"),
    ("glm4", "call f\n{}", [], "call f\n{}"),
    ("glm4", "So.<|assistant|>f\n{}", ["f"], "So."),
    (
        "lfm2",
        'So. <|tool_call_start|>[{"name":"f"}, {"name":"g"}]<|tool_call_end|>',
        ["f", "g"],
        "So.",
    ),
    ("lfm2", '<|tool_call_start|>{"name":"f"}<|tool_call_end|>', ["f"], ""),
    ("lfm2", "<|tool_call_start|>[f(), g()] so", ["f", "g"], "so"),
    ("lfm2", "[f()]", [], "[f()]"),
    ("hunyuan", '<tool_calls>[{"name":"f"}, {"name":"g"}]</tool_calls>', ["f", "g"], ""),
    ("hunyuan", "<tool_calls>\n<tool_call>f\n{}\n</tool_call>\n</tool_calls> so", ["f"], "so"),
]


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(("form", "text", "names", "content"), LOOSE)
def test_calls_are_read_as_models_write_them(
    form: str, text: str, names: list[str], content: str, step: int
) -> None:
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    parts = feed(FORMATS[form].parser(NAMES), pieces)
    assert [name for name, _ in calls_of(parts)] == names
    assert content_of(parts).split() == content.split()


@pytest.mark.parametrize("form", FORMATS)
def test_a_forced_call_that_is_cut_anywhere_is_no_content(form: str) -> None:
    text = FORMATS[form].call_text([ToolCall("", "f", {"a": 1}), ToolCall("", "g", {})])
    use = ToolUse((ToolFunction("f"), ToolFunction("g")), "required")
    for end in range(len(text) + 1):
        parts = feed(use.parser(FORMATS[form]), [text[:end]])
        assert content_of(parts) == ""
