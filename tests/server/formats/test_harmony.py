"""GPT-OSS's channels become reasoning, content and calls, and a grammar holds each to its own."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.formats.harmony import Harmony, HarmonyParser
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.text.answer import (
    Content,
    Part,
    Reasoning,
    ToolArguments,
    ToolCallStart,
)
from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.tag_matching import allows
from makers.text_engine import byte_level_tokenizer
from makers.tool_texts import feed

R, C = Reasoning, Content
START, ARGUMENTS = ToolCallStart(0, "", "f"), ToolArguments(0, '{"a": 1}')
THOUGHT = "<|channel|>analysis<|message|>So < 5.<|end|>"
NEXT = "<|start|>assistant"
READINGS: list[tuple[str, list[Part], int]] = [
    (f"{THOUGHT}{NEXT}<|channel|>final<|message|>Four.<|return|>", [R("So < 5."), C("Four.")], 0),
    ("<|channel|>final<|message|> Four. ", [C(" Four. ")], 0),
    ("<|channel|>final<|message|>", [], 0),
    ("Four. <|channel|>", [C("Four. <|channel|>")], 0),
    ("  ", [C("  ")], 0),
    # what a cut leaves of a header is nothing
    (f"{THOUGHT}{NEXT}<|channel|>fin", [R("So < 5.")], 0),
    # the recipient's place: as models write it, as the template does, in the analysis channel
    (
        f"{THOUGHT}{NEXT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"a": 1}<|call|>',
        [R("So < 5."), START, ARGUMENTS],
        0,
    ),
    (' to=functions.f<|channel|>commentary json<|message|> {"a": 1}', [START, ARGUMENTS], 0),
    ('<|channel|>analysis to=functions.f code<|message|>{"a": 1} ', [START, ARGUMENTS], 0),
    (
        f"{NEXT} to=functions.f<|channel|>commentary<|message|>{{}}<|call|>",
        [START, ToolArguments(0, "{}")],
        0,
    ),
    # words before a call; a second message is a paragraph
    (
        f"<|channel|>commentary<|message|>I look.<|end|>{NEXT}<|channel|>final<|message|>Four.",
        [C("I look.\n\nFour.")],
        0,
    ),
    (f"{THOUGHT}{NEXT}{THOUGHT}", [R("So < 5.\n\nSo < 5.")], 0),
    # no calls: nobody's function, no object, a broken one, one that a limit cut
    ("<|channel|>commentary to=functions.x<|message|>{}", [C("{}")], 1),
    ("<|channel|>commentary to=browser.search<|message|>{}", [C("{}")], 1),
    ("<|channel|>commentary to=functions.f<|message|>[1]", [C("[1]")], 1),
    (
        '<|channel|>commentary to=functions.f<|message|>{"a": oops}<|call|>',
        [START, ToolArguments(0, '{"a": '), C("oops}")],
        1,
    ),
    (
        '<|channel|>commentary to=functions.f<|message|>{"a": ',
        [START, ToolArguments(0, '{"a": ')],
        1,
    ),
]


def read(pieces: list[str], **state: object) -> tuple[list[Part], int]:
    parser = HarmonyParser(("f", "g"), **state)  # type: ignore[arg-type]
    return feed(parser, pieces), parser.num_failed


@pytest.mark.parametrize(("text", "parts", "num_failed"), READINGS)
def test_how_an_answer_is_read(text: str, parts: list[Part], num_failed: int) -> None:
    for pieces in ([text], list(text), [text[i : i + 7] for i in range(0, len(text), 7)]):
        assert read(pieces) == (parts, num_failed)
    shown = [part for part in parts if not isinstance(part, Reasoning)]
    assert read([text], shown=False)[0] == shown


FRAGMENTS = st.sampled_from(
    ["<|channel|>", "analysis", "final", "commentary", "<|message|>", "<|end|>", NEXT, "<|start|>"]
    + [" to=functions.f", " to=nobody", "<|constrain|>json", '{"a": 1}', "{", "}", "<|", "é", " "]
    + ["<|call|>", "<|return|>", "text", "x" * 290]
)


@given(st.lists(FRAGMENTS, max_size=14), st.lists(st.integers(0, 2000), max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_the_same_parts_in_pieces_of_any_size(
    fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(places, places[1:], strict=False)]
    assert read(pieces) == read([text]) == read(list(text))


def test_reasoning_that_is_not_parted_keeps_its_marks() -> None:
    text = f"{THOUGHT}{NEXT}<|channel|>final<|message|>Four."
    assert read([text], parted=False)[0] == [C(f"{THOUGHT}\n\nFour.")]


@pytest.mark.parametrize(
    ("prompt", "text", "parts"),
    [
        (f"<|start|>user<|message|>2?<|end|>{NEXT}", f"{THOUGHT}", [R("So < 5.")]),
        (f"{NEXT}<|channel|>analysis<|message|>", "So.<|end|>", [R("So.")]),
        (f"{NEXT}<|channel|>final<|message|>Fo", "ur.<|return|>", [C("ur.")]),
        (f"{NEXT}<|channel|>", "final<|message|>Four.", [C("Four.")]),
        ("no marks", "Four.", [C("Four.")]),
    ],
)
def test_the_end_of_the_prompt_says_how_the_answer_begins(
    prompt: str, text: str, parts: list[Part]
) -> None:
    assert read([text], prompt=prompt)[0] == parts


def test_several_calls_are_read_and_none_beyond_the_most() -> None:
    calls = [ToolCall("", "f", {"a": 1}), ToolCall("", "g", {"b": "é"})]
    text = Harmony().call_text(calls)
    second = [ToolCallStart(1, "", "g"), ToolArguments(1, '{"b": "é"}')]
    assert read([text]) == ([START, ARGUMENTS, *second], 0)
    assert read([text], max_calls=1) == ([START, ARGUMENTS], 0)


FUNCTION = ToolFunction(
    "f",
    "",
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    strict=True,
)
PROMPT = f"<|start|>user<|message|>2?<|end|>{NEXT}"


def test_a_grammar_leaves_room_for_reasoning_and_holds_a_call_or_the_final_message() -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate("<|channel|>{{ messages }}", {}))
    assert isinstance(chat.tool_format, Harmony)

    def tag(
        use: ToolUse, given: Constraint | None = None, prompt: str = PROMPT
    ) -> dict[str, object]:
        held = plan_answer(chat, prompt, use, given).constraint
        assert held is not None
        found: dict[str, object] = json.loads(held.value)["format"]
        return found

    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    final = "<|channel|>final<|message|>"
    forced = tag(ToolUse((FUNCTION,), "required"))
    for before in ("", THOUGHT + NEXT):
        assert allows(forced, f'{before}{call}{{"a": 1}}')
        assert not allows(forced, f'{before}{call}{{"a": "x"}}')
        assert not allows(forced, f"{before}{final}Four.")
    assert not allows(forced, THOUGHT)
    strict = tag(ToolUse((FUNCTION,)))
    assert allows(strict, f"{THOUGHT}{NEXT}{final}Four.")
    assert allows(strict, f'{THOUGHT}{NEXT}{call}{{"a": 1}}')
    assert not allows(strict, f'{THOUGHT}{NEXT}{call}{{"a": "x"}}')
    given = Constraint(ConstraintKind.REGEX, "[0-9]+")
    number = tag(ToolUse(), given)
    assert allows(number, f"{THOUGHT}{NEXT}{final}42") and allows(number, f"{final}42")
    assert not allows(number, "42") and not allows(number, f"{final}four")
    either = tag(ToolUse((FUNCTION,)), given)
    assert allows(either, f"{final}42") and allows(either, f'{call}{{"a": 1}}')
    within = plan_answer(chat, PROMPT + final, ToolUse(), given).constraint
    assert within == given


def test_the_marks_are_shown_to_the_parser_with_tools_or_without() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|x|>"])
    chat = Chat(tokenizer, ChatTemplate("<|channel|>{{ messages }}", {}))
    for reasoning in (None, False):
        plan = plan_answer(chat, PROMPT, ToolUse(), reasoning=reasoning)
        shown = {tokenizer.id_to_token(each) for each in plan.keep}
        assert shown == {"<|channel|>", "<|message|>", "<|end|>", "<|start|>"}
        parts = feed(plan.new_parser(), [f"{THOUGHT}{NEXT}<|channel|>final<|message|>Four."])
        assert parts[-1] == C("Four." if reasoning is None else f"{THOUGHT}\n\nFour.")
