"""Conversations of released families: rendered as transformers does, read as they are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from enginehouse.server.answer.plan import plan_answer
from enginehouse.server.formats.choose import choose_format
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.text.answer import Content, Reasoning
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.text.reasoning import MARKS, marks_of
from enginehouse.server.tools.format import Format, ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse, as_tag
from makers.tag_matching import allows
from makers.templates import FAMILIES, theirs
from makers.text_engine import byte_level_tokenizer
from makers.tool_texts import calls_of, feed

SPECIAL: dict[str, str | list[str]] = {"bos_token": "<s>", "eos_token": "</s>"}
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
REASONING = {
    **dict.fromkeys(("deepseek_v31", "glm45", "minimax_m2", "lfm2"), "think"),
    **{name: name for name in ("harmony", "command", "seed_oss", "hunyuan")},
}
ONE_CALL_EACH = ("harmony", "glm4")  # in a message, its result behind it
FORGET = ("deepseek_v31", "hunyuan")  # what was thought is not shown again
WEATHER = ToolFunction(
    "get_weather",
    "The weather <now>",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
)
CLOCK = ToolFunction("get_time", "The time", {"type": "object", "properties": {}})
USE = ToolUse((WEATHER, CLOCK))
SHOWN = PromptOptions(tools=USE)
# Ids as Kimi K2 wants them, which other templates do not show or number themselves.
ARGUMENTS = {"city": "Orléans & <Paris>", "days": 2, "units": ["C"]}
PARIS = ToolCall("functions.get_weather:0", "get_weather", ARGUMENTS)
TIME = ToolCall("functions.get_time:1", "get_time", {})
SYSTEM, USER = ChatMessage("system", "be brief"), ChatMessage("user", "What now?")
THINKS = ChatMessage("assistant", "", tool_calls=(PARIS,), reasoning_content="A look outside.")
RESULT = ChatMessage("tool", '{"sky": "clear"}', None, PARIS.id)
ANSWER, MORE = ChatMessage("assistant", "Clear skies."), ChatMessage("user", "And now?")
CONVERSATIONS = {
    "plain": [USER],
    "turns": [SYSTEM, USER, ANSWER, MORE],
    "call": [SYSTEM, USER, THINKS, RESULT],
    "after": [USER, THINKS, RESULT, ANSWER, MORE],
    "two": [
        USER,
        replace(THINKS, tool_calls=(PARIS, TIME)),
        RESULT,
        ChatMessage("tool", "noon", None, TIME.id),
    ],
}


@EVERY_FAMILY
def test_a_family_is_known_by_its_template(name: str) -> None:
    form, marks = choose_format(FAMILIES[name]), marks_of(FAMILIES[name])
    assert form is not None and form.name == name
    assert marks == (MARKS[REASONING[name]] if name in REASONING else None)


def in_granite(message: ChatMessage) -> str:
    calls = [
        (call.name, json.dumps(dict(call.arguments), ensure_ascii=False))
        for call in message.tool_calls
    ]
    texts = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls]
    return f"<|tool_call|>[{', '.join(texts)}]" if texts else message.content


def rendered_by_them(
    name: str, messages: list[ChatMessage], tools: tuple[ToolFunction, ...], add: bool
) -> str:
    """A template that shows no calls is given them as content, as its model writes them."""
    if name == "granite":
        messages = [replace(each, content=in_granite(each), tool_calls=()) for each in messages]
    as_text = name == "deepseek_v31"
    return theirs(FAMILIES[name], messages, tools, as_text, add_generation_prompt=add)


@EVERY_FAMILY
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_conversation_renders_as_transformers_does(name: str, conversation: str) -> None:
    template = ChatTemplate(FAMILIES[name], SPECIAL)
    chat = Chat(byte_level_tokenizer(), template)
    messages = CONVERSATIONS[conversation]
    if name in ONE_CALL_EACH:
        messages = template.arrange(messages)
    for tools in ((), (WEATHER, CLOCK)):
        for add in (True, False):
            ours = chat.render(messages, PromptOptions(add, tools=ToolUse(tools)))
            assert ours == rendered_by_them(name, messages, tools, add)


@EVERY_FAMILY
@pytest.mark.parametrize("calls", [(PARIS,), (PARIS, TIME)], ids=len)
def test_a_past_call_as_the_template_writes_it_is_read_as_that_call(
    name: str, calls: tuple[ToolCall, ...]
) -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate(FAMILIES[name], SPECIAL))
    said = replace(THINKS, tool_calls=calls[:1] if name == "harmony" else calls)
    prompt = chat.render([USER], SHOWN)
    within = "<think>\n" if prompt.endswith("<think>\n") else ""
    whole = chat.render([USER, said], PromptOptions(False, tools=USE))
    prompt = prompt.removesuffix("</think>")  # of DeepSeek's, where nothing is thought
    assert whole.startswith(prompt.removesuffix(within))
    answer = whole.removeprefix(prompt.removesuffix(within)).removeprefix(within)
    plan = plan_answer(chat, prompt, USE)
    parser = plan.new_parser()
    for pieces in ([answer], list(answer)):
        parts = feed(plan.new_parser(), pieces)
        assert calls_of(parts) == [(call.name, dict(call.arguments)) for call in said.tool_calls]
    feed(parser, [answer])
    assert parser.num_failed == 0
    thought = [part.text for part in parts if isinstance(part, Reasoning)]
    shows = name in REASONING and name not in FORGET
    assert thought == ([said.reasoning_content] if shows else [])
    end = "".join(part.text for part in parts if isinstance(part, Content)).strip()
    assert end in ("", *ENDS), end


# What ends a turn, which a server sees as a token and not as text.
ENDS = ("<|im_end|>", "<|end_of_text|>", "<|END_OF_TURN_TOKEN|>", "[e~[", "<seed:eos>")
ENDS += ("</s>", "<｜end▁of▁sentence｜>", "</think><｜end▁of▁sentence｜>")
ENDS += ("<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",)  # always asked to go on


@EVERY_FAMILY
def test_a_forced_call_is_what_the_template_would_show_or_is_read_as_it(name: str) -> None:
    """What a grammar lets through, a parser reads, after reasoning or without."""
    chat = Chat(byte_level_tokenizer(), ChatTemplate(FAMILIES[name], SPECIAL))
    assert chat.tool_format is not None
    use = ToolUse((WEATHER, CLOCK), "required")
    plan = plan_answer(chat, chat.render([USER], SHOWN), use)
    assert plan.constraint is not None
    tag = as_tag(plan.constraint)
    form = chat.tool_format
    call = Format.call_text(form, [PARIS]) if name == "lfm2" else form.call_text([PARIS])
    marks = chat.marks
    begun = name == "minimax_m2"
    thought = f"{'' if begun or marks is None else marks.open}So.{marks.close if marks else ''}"
    if name == "harmony":
        thought += "<|start|>assistant"
    answers = [] if begun else [call]
    answers += [thought + call] if marks is not None and name != "deepseek_v31" else []
    for answer in answers:
        assert allows(tag, answer), answer
        assert calls_of(
            [part for part in feed(plan.new_parser(), [answer]) if not isinstance(part, Reasoning)]
        ) == [("get_weather", ARGUMENTS)]
    assert not allows(tag, "Sunny.")


def test_glm_4_is_shown_words_beside_calls_and_each_result_behind_its_call() -> None:
    template = ChatTemplate(FAMILIES["glm4"], SPECIAL)
    said = replace(THINKS, content="I look.", tool_calls=(PARIS, TIME))
    results = [ChatMessage("tool", "noon", None, TIME.id), RESULT]
    text = template.render(template.arrange([USER, said, *results]))
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert text == (
        "[gMASK]<sop><|user|>\nWhat now?<|assistant|>\nI look."
        f"<|assistant|>get_weather\n{arguments}<|observation|>\n{RESULT.content}"
        "<|assistant|>get_time\n{}<|observation|>\nnoon<|assistant|>"
    )


def test_lfm2_is_shown_thoughts_and_words_beside_a_call_apart() -> None:
    template = ChatTemplate(FAMILIES["lfm2"], SPECIAL)
    text = template.render([USER, replace(THINKS, content="I look."), RESULT])
    assert "<think>A look outside.</think>I look.<|tool_call_start|>[get_weather(" in text


def test_a_template_of_lfm2_that_knows_no_calls_shows_them_as_they_are_written() -> None:
    source = "<|tool_list_start|>{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = Chat(byte_level_tokenizer(), ChatTemplate(source, {}))
    said = replace(THINKS, tool_calls=(TIME, replace(PARIS, arguments={"city": "L'Aquila"})))
    text = chat.render([USER, said, RESULT], SHOWN)
    call = """<|tool_call_start|>[get_time(), get_weather(city="L'Aquila")]<|tool_call_end|>"""
    assert call in text and text.endswith(RESULT.content)


def test_gpt_oss_is_shown_words_and_thoughts_beside_a_call_once() -> None:
    """Its template refuses both in one message, and more than one call."""
    template = ChatTemplate(FAMILIES["harmony"], SPECIAL)
    said = replace(THINKS, content="I look.", tool_calls=(PARIS, TIME))
    results = [RESULT, ChatMessage("tool", "noon", None, TIME.id)]
    text = template.render(template.arrange([USER, said, *results]))
    thought = "<|channel|>analysis<|message|>A look outside.\n\nI look.<|end|>"
    assert text.count("A look outside.") == 1 and thought in text
    for part in ("to=functions.get_weather", "to=functions.get_time", '"noon"'):
        assert part in text
