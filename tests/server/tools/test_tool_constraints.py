"""What a grammar lets through is a call: checked with xgrammar itself, and by a model of noise."""

from __future__ import annotations

import json

import pytest

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.text.message import ToolCall
from enginehouse.server.text.reasoning import after_reasoning
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse, as_constraint, as_tag
from makers.tag_matching import allows, noise
from makers.text_engine import CHATML, byte_level_tokenizer
from makers.tool_texts import CLOCK, FORMATS, TIME, XML_FORMATS, calls_of, content_of, feed

WEATHER = ToolFunction(
    "get_weather",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "pattern": "^[ -~]{0,8}$"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "unit"],
    },
)
BOTH = (WEATHER, CLOCK)
ALL = {**FORMATS, **XML_FORMATS}
FORMS = pytest.mark.parametrize("form", ALL.values(), ids=ALL)
PARIS = ToolCall("", "get_weather", {"city": "Paris", "days": 2, "unit": "C"})
WRONG = ToolCall("", "get_weather", {"city": "Paris", "unit": "K"})


def written(form: Format, *calls: ToolCall) -> str:
    """As the model is held to write them: Python calls as JSON."""
    form = FORMATS["llama3_json"] if form.name == "llama_pythonic" else form
    return Format.call_text(form, calls) if form.name == "lfm2" else form.call_text(calls)


@FORMS
def test_required_takes_calls_of_the_functions_and_nothing_else(form: Format) -> None:
    tag = ToolUse(BOTH, "required").tag(form)
    assert allows(tag, written(form, PARIS))
    assert allows(tag, written(form, PARIS, TIME, PARIS))
    for text in ("", "Sunny.", "Well, " + written(form, PARIS), written(form, WRONG)):
        assert not allows(tag, text), text
    assert not allows(tag, written(form, ToolCall("", "get_date", {})))
    assert not allows(tag, written(form, ToolCall("", "get_time", {"zone": "UTC"})))


@FORMS
@pytest.mark.parametrize(
    "use", [ToolUse(BOTH, "required", parallel=False), ToolUse(BOTH, named="get_time")]
)
def test_one_call_is_one(form: Format, use: ToolUse) -> None:
    tag = use.tag(form)
    assert allows(tag, written(form, TIME))
    assert not allows(tag, written(form, TIME, TIME))
    assert allows(tag, written(form, PARIS)) == (use.named is None)


@FORMS
@pytest.mark.parametrize("use", [ToolUse(BOTH, "required"), ToolUse(BOTH, named="get_weather")])
def test_a_model_of_noise_under_the_grammar_makes_valid_calls(form: Format, use: ToolUse) -> None:
    tag = use.tag(form)
    assert tag is not None
    for seed in range(4):
        parser = use.parser(form)
        text = noise(as_constraint(tag), seed)
        parts = feed(parser, text)
        assert (parser.num_failed, content_of(parts)) == (0, ""), text
        calls = calls_of(parts)
        assert calls and (use.named is None or len(calls) == 1)
        for name, arguments in calls:
            assert name == "get_weather" or (name, arguments) == ("get_time", {})
            if name == "get_weather":
                assert set(arguments) - {"days"} == {"city", "unit"}
                assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 8
                assert isinstance(arguments.get("days", 0), int) and arguments["unit"] in ("C", "F")


@pytest.mark.parametrize("name", [name for name in ALL if name != "llama_pythonic"])
def test_strict_functions_are_held_to_their_schema_once_a_call_begins(name: str) -> None:
    form = ALL[name]
    strict = ToolFunction("get_weather", "", WEATHER.parameters, strict=True)
    tag = ToolUse((strict, CLOCK)).tag(form)
    loose = ToolCall("", "get_time", {"any": [1, {"thing": None}]})
    assert allows(tag, "It is sunny.")
    assert allows(tag, "Let me see.\n" + written(form, PARIS, loose))
    assert not allows(tag, written(form, WRONG))
    single = ToolUse((strict, CLOCK), parallel=False).tag(form)
    assert allows(single, "Now.\n" + written(form, PARIS))
    assert not allows(single, written(form, PARIS, loose))


def test_what_asks_for_nothing_is_not_constrained() -> None:
    for form in ALL.values():
        assert ToolUse(BOTH).tag(form) is None
        assert ToolUse().tag(form) is None
        assert ToolUse(BOTH, "none", parallel=False).tag(form) is None


def test_what_cannot_be_enforced_is_refused() -> None:
    strict = ToolFunction("f", strict=True)
    with pytest.raises(RequestError) as caught:
        ToolUse((CLOCK, strict)).tag(FORMATS["llama_pythonic"])
    assert caught.value.param == "tools[1].function.strict"
    number = ToolFunction("f", "", {"type": "number"})
    with pytest.raises(RequestError) as caught:
        ToolUse((CLOCK, number), "required").tag(FORMATS["json"])
    assert caught.value.param == "tools[1].function.parameters"
    with pytest.raises(RequestError) as caught:
        ToolUse((CLOCK,), named="clock").tag(FORMATS["json"])
    assert caught.value.param == "tool_choice.function.name"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
KINDS = [
    (ConstraintKind.JSON_OBJECT, "", '{"b": []}', "[]"),
    (ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), '{"a": 1}', '{"a": ""}'),
    (ConstraintKind.REGEX, "[ab]+c", "abac", "abacc"),
    (ConstraintKind.EBNF, 'root ::= "x" root | "y"', "xxy", "xx"),
    (ConstraintKind.CHOICE, '["yes", "no"]', "no", "maybe"),
    (
        ConstraintKind.STRUCTURAL_TAG,
        '{"type": "structural_tag", "format": {"type": "const_string", "value": "ok"}}',
        "ok",
        "ko",
    ),
]


@pytest.mark.parametrize(("kind", "value", "good", "bad"), KINDS)
def test_every_constraint_can_follow_reasoning_and_stand_beside_calls(
    kind: ConstraintKind, value: str, good: str, bad: str
) -> None:
    tag = as_tag(Constraint(kind, value))
    assert allows(tag, good) and not allows(tag, bad)
    begun, free = after_reasoning(tag, begun=True), after_reasoning(tag, begun=False)
    for text in (f"I <think> so{{</think>{good}", f"</think>\n\n{good}"):
        assert allows(begun, text) and allows(free, "<think>" + text)
    for text in (f"hm</think>{bad}", good, "hm"):
        assert not allows(begun, text)
    assert allows(free, good) and not allows(free, bad)
    chat = Chat(byte_level_tokenizer(), ChatTemplate(CHATML, {}))
    both = plan_answer(chat, "", ToolUse((CLOCK,)), Constraint(kind, value)).constraint
    assert both is not None
    joined = json.loads(both.value)["format"]
    assert allows(joined, good) and allows(joined, '{"name": "get_time", "arguments": {}}')
    assert not allows(joined, bad)


def test_white_space_in_forced_arguments_is_bounded() -> None:
    tag = ToolUse((WEATHER,), "required").tag(FORMATS["json"])
    text = FORMATS["json"].call_text([PARIS])
    assert allows(tag, text)
    is_bounded = installed().has("max_whitespace_cnt")
    assert allows(tag, text.replace('"days": ', '"days":     ')) != is_bounded
