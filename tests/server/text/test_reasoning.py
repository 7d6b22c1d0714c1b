"""Reasoning is parted from the answer, in pieces of any size, and what follows it is read on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginehouse.server.text.answer import (
    Content,
    Part,
    PlainParser,
    Reasoning,
    ToolArguments,
    ToolCallStart,
)
from enginehouse.server.text.reasoning import (
    MARKS,
    THINK,
    AroundParser,
    ReasoningParser,
    goes_on_thinking,
    marks_of,
    opens_reasoning,
)
from makers.tool_texts import FORMATS, NAMES, feed

R, C = Reasoning, Content
READINGS: list[tuple[bool, str, list[Part]]] = [
    (False, "<think>\nSo.\n\nYes.\n</think>\n\nFour.", [R("So.\n\nYes."), C("Four.")]),
    (False, " \n<think>So.</think>Four. ", [R("So."), C("Four. ")]),
    (False, "<think>\n\n</think>\n\nFour.", [C("Four.")]),
    (False, "Four. <think>no</think>", [C("Four. <think>no</think>")]),
    (False, " Four.", [C(" Four.")]),
    (False, "<thin", [C("<thin")]),
    (False, "<think>So < 5 </thin", [R("So < 5 </thin")]),
    (False, "<think>a</think>b</think>c", [R("a"), C("b</think>c")]),
    (False, "<think>", []),
    (True, "So.</think>Four.", [R("So."), C("Four.")]),
    (True, "\nSo.\n</think>\n", [R("So.")]),
    (True, "<think>\nSo.</think>Four.", [R("So."), C("Four.")]),
    (True, "So. And", [R("So. And")]),
    (True, "<thi", [R("<thi")]),
    (True, "</think>Four.", [C("Four.")]),
]


@pytest.mark.parametrize(("begun", "text", "parts"), READINGS)
def test_how_an_answer_is_parted(begun: bool, text: str, parts: list[Part]) -> None:
    for pieces in ([text], list(text), [text[:3], "", text[3:]]):
        assert feed(ReasoningParser(PlainParser(), begun), pieces) == parts
        shown = feed(ReasoningParser(PlainParser(), begun, shown=False), pieces)
        assert shown == [part for part in parts if not isinstance(part, Reasoning)]


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<think", "</th", ">", " ", "\n\n", "so", "é🙂", "<tool_call>"]
    + ['{"name": "f", "arguments": {"a": 1}}', "</tool_call>", "<"]
)


@given(
    fragments=st.lists(FRAGMENTS, max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    begun=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_text_gives_the_same_parts_in_pieces_of_any_size(
    fragments: list[str], cuts: list[int], begun: bool
) -> None:
    text = "".join(fragments)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(places, places[1:], strict=False)]

    def read(pieces: list[str]) -> tuple[list[Part], int]:
        parser = ReasoningParser(FORMATS["hermes"].parser(NAMES), begun)
        return feed(parser, pieces), parser.num_failed

    assert read(pieces) == read([text]) == read(list(text))


def test_a_call_after_reasoning_is_read_and_one_within_it_is_not() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parser = ReasoningParser(FORMATS["hermes"].parser(NAMES))
    parts = feed(parser, [f"<think>I could {call}</think>\n{call}<tool_call>no"])
    assert parts == [
        Reasoning(f"I could {call}"),
        ToolCallStart(0, "", "f"),
        ToolArguments(0, "{}"),
        Content("<tool_call>no"),
    ]
    assert parser.num_failed == 1


def test_reasoning_comes_as_it_is_written() -> None:
    parser = ReasoningParser(PlainParser(), begun=True)
    assert parser.push("\nWell") == [Reasoning("Well")]
    assert parser.push(", two </") == [Reasoning(", two")]
    assert parser.push("three") == [Reasoning(" </three")]


def test_which_models_reason_and_when_a_prompt_has_begun_it() -> None:
    assert marks_of("{{ x }}</think>") == THINK
    assert marks_of("{{ x }}") is marks_of(None) is marks_of("</think>", "none") is None
    assert marks_of(None, "think") == THINK
    assert opens_reasoning("<|Assistant|><think>\n")
    assert not opens_reasoning("<think>\n\n</think>\n\n") and not opens_reasoning("hello")


@pytest.mark.parametrize(
    ("prompt", "continued", "within"),
    [
        ("<think>", "", True),
        ("a <think> b", "", False),
        ("...<think>\nOkay", "<think>\nOkay", True),
        ("...<think>\nOkay</think>\nParis", "<think>\nOkay</think>\nParis", False),
        ("user: <think> assistant: Par", "Par", False),
    ],
)
def test_a_begun_thought_is_gone_on_with(prompt: str, continued: str, within: bool) -> None:
    assert opens_reasoning(prompt, continued) == within


PAIRS = [name for name, marks in MARKS.items() if name != "harmony" and marks.around is None]


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_marks_parts_an_answer(name: str) -> None:
    marks = MARKS[name]
    template = f"{{{{ '{marks.open}' + x + '{marks.close}' }}}}"
    assert marks_of(template) == marks_of(None, name) == marks
    text = f"{marks.open}\nSo < 5.\n{marks.close}\n\nFour."
    for pieces in ([text], list(text)):
        assert feed(ReasoningParser(PlainParser(), marks=marks), pieces) == [
            R("So < 5."),
            C("Four."),
        ]
    assert opens_reasoning(f"<s>{marks.open}\n", marks=marks)
    assert goes_on_thinking(f"{marks.open}Okay", marks)
    assert not goes_on_thinking(f"{marks.open}Okay{marks.close}", marks)


ANSWERS = [  # of Granite 3.3
    ("<think>So.</think><response>Four.</response>", [R("So."), C("Four.")]),
    ("<think>So.</think>\n<response>Four < 5</resp", [R("So."), C("Four < 5</resp")]),
    ("<response>Four.</response>\n", [C("Four.\n")]),
    ("<respond>Four.</response>", [C("<respond>Four.</response>")]),
    ("<response></response>", []),
    ("<respo", [C("<respo")]),
    ("Four.", [C("Four.")]),
    ("<response>\n\nFour.\n\nYes.\n</response>", [C("Four.\n\nYes.")]),
    ("<response>\nFour. \n", [C("Four. \n")]),
]


@pytest.mark.parametrize(("text", "parts"), ANSWERS)
def test_what_an_answer_stands_between_is_left_out(text: str, parts: list[Part]) -> None:
    marks = marks_of("{{ '</think> <response></response>' }}")
    assert marks == MARKS["granite"] and marks.around is not None
    for pieces in ([text], list(text), [text[:9], text[9:30], text[30:]]):
        parser = ReasoningParser(AroundParser(PlainParser(), marks.around), marks=marks)
        assert feed(parser, pieces) == parts


def test_hunyuan_answers_between_marks_on_lines_of_their_own() -> None:
    marks = marks_of("{{ content.split('<answer>')[-1] }} </think>")
    assert marks == MARKS["hunyuan"] and marks.around is not None
    text = "<think>\nSo.\n</think>\n<answer>\nFour.\n\nYes.\n</answer>"
    for pieces in ([text], list(text)):
        parser = ReasoningParser(AroundParser(PlainParser(), marks.around), marks=marks)
        assert feed(parser, pieces) == [R("So."), C("Four.\n\nYes.")]
