"""From a request and its tools to a plan, and a conversation that uses it."""

from __future__ import annotations

import pytest

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.text.answer import Content, Reasoning, ToolCallStart
from enginehouse.server.text.detokenizer import Detokenizer
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.templates import TEMPLATES
from makers.text_engine import CHATML, byte_level_tokenizer, tokenizer_with_marks
from makers.tool_texts import calls_of, content_of, feed

WEATHER = ToolFunction(
    "get_weather", "", {"type": "object", "properties": {"city": {"type": "string"}}}
)
SPECIAL: dict[str, str | list[str]] = {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_that_mark_calls_are_shown_to_the_parser_and_no_others() -> None:
    chat = Chat(tokenizer_with_marks(), ChatTemplate(TEMPLATES["hermes"], SPECIAL))
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ça"}}\n</tool_call>'
    ids = chat.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False).ids
    plan = plan_answer(chat, "", ToolUse((WEATHER,)))
    shown = {chat.tokenizer.id_to_token(token_id) for token_id in plan.keep}
    assert shown == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    detokenizer = Detokenizer(chat.pieces, plan.keep)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == text
    assert calls_of(feed(plan.new_parser(), pieces)) == [("get_weather", {"city": "Ça"})]
    plain = plan_answer(chat, "", ToolUse((WEATHER,), "none"))
    assert {chat.tokenizer.id_to_token(item) for item in plain.keep} == {"<think>", "</think>"}
    assert feed(plain.new_parser(), [text]) == [Content(text)]


def test_a_tool_choice_without_tools_is_refused() -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate(CHATML, {}))
    for use in (ToolUse((), "required"), ToolUse((), named="f")):
        with pytest.raises(RequestError) as caught:
            plan_answer(chat, "", use)
        assert caught.value.param == "tool_choice"


def test_two_functions_of_one_name_are_refused() -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate(CHATML, {}))
    with pytest.raises(RequestError) as caught:
        plan_answer(chat, "", ToolUse((WEATHER, ToolFunction("f"), ToolFunction("get_weather"))))
    assert caught.value.param == "tools[2].function.name"


def test_reasoning_is_parted_where_the_engine_or_the_request_says() -> None:
    chat = Chat(tokenizer_with_marks(), ChatTemplate(TEMPLATES["reasoning"], SPECIAL))
    prompt = chat.render([ChatMessage("user", "2 + 2?")])
    text = "Two twos.</think>\n\nFour."
    plan = plan_answer(chat, prompt, ToolUse())
    assert len(plan.keep) == 2 and plan.constraint is None
    parts = feed(plan.new_parser(), [text])
    assert (parts[0], content_of(parts)) == (Reasoning("Two twos."), "Four.")
    hidden = plan_answer(chat, prompt, ToolUse(), include_reasoning=False)
    assert feed(hidden.new_parser(), [text]) == parts[1:]
    raw = plan_answer(chat, prompt, ToolUse(), reasoning=False)
    assert (content_of(feed(raw.new_parser(), [text])), raw.keep) == (text, plan.keep)
    given = Constraint(ConstraintKind.REGEX, "[0-9]+")
    held = plan_answer(chat, prompt, ToolUse(), given).constraint
    assert held is not None and held.kind is ConstraintKind.STRUCTURAL_TAG
    closed = plan_answer(chat, "<think>\n\n</think>\n\n", ToolUse(), given).constraint
    assert closed == given


@pytest.mark.parametrize("name", sorted({*TEMPLATES, "chatml"}))
def test_a_conversation_in_two_turns(name: str) -> None:
    """Ask, read the call, answer it, ask again: the second prompt holds call and result."""
    source = {**TEMPLATES, "chatml": CHATML}[name]
    chat = Chat(tokenizer_with_marks(), ChatTemplate(source, SPECIAL))
    use = ToolUse((WEATHER,))
    options = PromptOptions(tools=use)
    messages = [ChatMessage("user", "How is the weather in Paris?")]
    first = chat.prompt(messages, 10_000, options)
    assert "get_weather" in first.text
    plan = plan_answer(chat, first.text, use)
    assert chat.tool_format is not None
    thought = "Let me look.</think>\n" if name == "reasoning" else ""
    answer = thought + chat.tool_format.call_text([ToolCall("", "get_weather", {"city": "Paris"})])
    detokenizer = Detokenizer(chat.pieces, plan.keep)
    ids = chat.tokenizer.encode(answer, add_special_tokens=False).ids
    parser = plan.new_parser()
    raw = [part for token_id in ids for part in parser.push(detokenizer.push([token_id]))]
    raw += parser.flush()
    [start] = [part for part in raw if isinstance(part, ToolCallStart)]
    [(_, arguments)] = calls_of(feed(plan.new_parser(), [answer]))
    assert (start.name, arguments, parser.num_failed) == ("get_weather", {"city": "Paris"}, 0)
    call = ToolCall(start.id, start.name, arguments)
    messages += [
        ChatMessage("assistant", "", tool_calls=(call,)),
        ChatMessage("tool", "18 degrees and clear", None, call.id),
    ]
    second = chat.prompt(messages, 10_000, options)
    for text in (messages[0].content, '{"city": "Paris"}', "18 degrees and clear"):
        assert second.text.count(text) == 1, text
    final = feed(plan_answer(chat, second.text, use).new_parser(), [thought + "It is mild."])
    assert content_of(final) == "It is mild."
