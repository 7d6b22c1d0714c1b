"""Rendering equals transformers' apply_chat_template, and what a template cannot do is made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from enginehouse.runtime.errors import RequestError
from enginehouse.server.prompt.chat import Chat
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.prompt.template import ChatTemplate
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.templates import TEMPLATES, theirs
from makers.text_engine import CHATML, byte_level_tokenizer

SPECIAL: dict[str, str | list[str]] = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = ToolFunction(
    "get_weather",
    "The weather <now>",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CLOCK = ToolFunction("get_time")
CONTINUED = PromptOptions(False, continue_final_message=True)
PARIS = ToolCall("abc123DEF", "get_weather", {"city": "Paris & Orléans", "days": [1, None]})
TIME = ToolCall("zzz000AAA", "get_time", {})
SYSTEM, USER = ChatMessage("system", "be brief"), ChatMessage("user", "  What now? ")
CALL = ChatMessage("assistant", "", tool_calls=(PARIS,))
RESULT = ChatMessage("tool", '{"sky": "clear"}', None, PARIS.id)
ANSWER, MORE = ChatMessage("assistant", "Clear skies."), ChatMessage("user", "And now?")
CONVERSATIONS = {
    "plain": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, MORE],
    "call": [SYSTEM, USER, CALL, RESULT],
    "after": [USER, CALL, RESULT, ANSWER, MORE],
    "two": [
        USER,
        ChatMessage("assistant", "", tool_calls=(PARIS, TIME)),
        RESULT,
        ChatMessage("tool", "noon", None, TIME.id),
    ],
}


@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, CLOCK]], ids=len)
@pytest.mark.parametrize("name", ["plain", "system", "turns", "call", "after", "two"])
@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "mistral_named"])
def test_tools_calls_and_results_render_as_transformers_does(
    form: str, name: str, tools: list[ToolFunction]
) -> None:
    template, messages = ChatTemplate(TEMPLATES[form], SPECIAL), CONVERSATIONS[name]
    shown = PromptOptions(tools=ToolUse(tuple(tools)))
    if form == "llama3_json" and name == "two":  # it refuses several calls in one message
        with pytest.raises(RequestError, match="single tool-calls"):
            template.render(messages, shown)
        messages = template.arrange(messages)
        assert [len(message.tool_calls) for message in messages] == [0, 1, 0, 1, 0]
    for add in (True, False):
        expected = theirs(TEMPLATES[form], messages, tools, add_generation_prompt=add)
        assert template.render(messages, replace(shown, add_generation_prompt=add)) == expected


@pytest.mark.parametrize("form", sorted({*TEMPLATES, "chatml"}))
@pytest.mark.parametrize("text", ["Clear", "Clear  ", " Clear, and", ""])
def test_a_final_message_is_continued_as_transformers_does(form: str, text: str) -> None:
    source = {**TEMPLATES, "chatml": CHATML}[form]
    messages = [USER, ChatMessage("assistant", text)]
    ours = ChatTemplate(source, SPECIAL).render(messages, CONTINUED)
    assert ours == theirs(source, messages, [], continue_final_message=True)
    assert ours.rstrip().endswith(text.strip())


def test_variables_reach_the_template_and_replace_nothing_of_the_request() -> None:
    source = TEMPLATES["hermes"]
    template = ChatTemplate(source, SPECIAL)
    text = template.render([USER], PromptOptions(variables={"enable_thinking": False}))
    assert text.endswith("<think>\n\n</think>\n\n")
    assert text == theirs(source, [USER], [], add_generation_prompt=True, enable_thinking=False)
    for name in ("messages", "tools", "add_generation_prompt", "documents", "eos_token", "other"):
        options = PromptOptions(variables={name: []})
        assert template.render([USER], options) == template.render([USER])
        assert template.unread(options) == [f"chat_template_kwargs.{name}"]


def test_an_effort_reaches_templates_that_read_it_and_none_turns_thinking_off() -> None:
    template = ChatTemplate(TEMPLATES["hermes"], SPECIAL)
    none, low = PromptOptions(reasoning_effort="none"), PromptOptions(reasoning_effort="low")
    off = PromptOptions(variables={"enable_thinking": False})
    assert template.render([USER], none) == template.render([USER], off)
    assert (template.unread(none), template.unread(low)) == ([], ["reasoning_effort"])
    reads = ChatTemplate("{{ reasoning_effort }}", {})
    assert (reads.render([USER], low), reads.unread(low)) == ("low", [])


def test_a_call_that_cannot_be_read_is_shown_as_it_came_where_text_is_shown() -> None:
    call = ToolCall("call0", "f", {}, '{"a": ')
    said = [USER, ChatMessage("assistant", "", tool_calls=(call,))]
    shows = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments"
    as_text = ChatTemplate(shows + " + '' }}{% endfor %}{% endfor %}", {})
    as_object = ChatTemplate(shows + " | tojson }}{% endfor %}{% endfor %}", {})
    assert as_text.render(said) == '{"a": ' and as_object.render(said) == "{}"


def test_a_final_message_the_template_does_not_show_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(RequestError) as caught:
        template.render([USER, ANSWER], CONTINUED)
    assert caught.value.param == "continue_final_message"


def test_what_a_template_does_with_calls_and_tools_is_found_out() -> None:
    found = {}
    for form, source in {**TEMPLATES, "chatml": CHATML}.items():
        template = ChatTemplate(source, SPECIAL)
        found[form] = (template.knows_tools, template.keeps_calls, template.takes_several_calls)
        assert template.keeps_tool, form
    assert found == {
        "chatml": (False, False, False),
        "hermes": (True, True, True),
        "llama3_json": (True, True, False),
        "mistral": (True, True, True),
        "mistral_named": (True, True, True),
        "reasoning": (False, True, True),
    }


def test_ids_and_arguments_take_the_form_a_template_wants() -> None:
    long = "call_0123456789abcdef01234567"
    call = ChatMessage("assistant", "", tool_calls=(ToolCall(long, "f", {"a": "é"}),))
    result = ChatMessage("tool", "42", None, long)
    text = ChatTemplate(TEMPLATES["mistral"], SPECIAL).render([USER, call, result])
    calls, results = text.split("[TOOL_RESULTS]")
    short = json.loads(calls[calls.index("[{") :].removesuffix("</s>"))[0]["id"]
    assert (len(short), short.isalnum()) == (9, True)
    assert json.loads(results.removesuffix("[/TOOL_RESULTS]"))["call_id"] == short
    text = ChatTemplate(TEMPLATES["reasoning"], SPECIAL).render([USER, call, result])
    assert '<|call|>f\n{"a": "é"}<|output|>42' in text


def test_without_a_place_for_tools_they_are_words_in_the_messages() -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate(CHATML, {}))
    options = PromptOptions(tools=ToolUse((WEATHER,)))
    two = CONVERSATIONS["two"]
    text = chat.render([SYSTEM, *two, MORE], options)
    turns = text.removesuffix("<|im_start|>assistant\n").split("<|im_end|>\n")
    system, user, calls, results, end = turns
    assert end == ""
    assert system.startswith("<|im_start|>system\nbe brief\n\n")
    assert json.dumps(WEATHER.to_template()["function"], ensure_ascii=False) in system
    assert user == "<|im_start|>user\n" + USER.content
    head, *written = calls.split("\n")
    assert head == "<|im_start|>assistant"
    assert [json.loads(line) for line in written] == [
        {"name": call.name, "arguments": dict(call.arguments)} for call in (PARIS, TIME)
    ]
    assert results == (
        '<|im_start|>user\nResult of get_weather:\n{"sky": "clear"}\n\n'
        "Result of get_time:\nnoon\n\nAnd now?"
    )


def test_without_a_system_message_the_words_stand_before_the_user_s() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    chat = Chat(byte_level_tokenizer(), ChatTemplate(source, {}))
    text = chat.render([USER], PromptOptions(tools=ToolUse((WEATHER,))))
    assert text.startswith("[You can call") and text.endswith(f"\n\n{USER.content}]")


def test_an_engine_that_calls_no_tools_says_so() -> None:
    chat = Chat(byte_level_tokenizer(), ChatTemplate(TEMPLATES["hermes"], {}), tool_format="none")
    with pytest.raises(RequestError) as caught:
        chat.render([USER], PromptOptions(tools=ToolUse((WEATHER,))))
    assert caught.value.param == "tools"
    hidden = chat.render([USER], PromptOptions(tools=ToolUse((WEATHER,), choice="none")))
    assert hidden == chat.render([USER])


def test_a_template_that_wants_descriptions_is_given_them() -> None:
    """Hermes' own stops at a function without one, or without properties."""
    source = (
        "{% for tool in tools or [] %}{{ tool.function.name + ': ' + tool.function.description }}"
        "{{ tool.function.parameters.properties | length }}{% endfor %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, {})
    assert template.knows_tools
    shown = PromptOptions(tools=ToolUse((ToolFunction("f"), ToolFunction("g", "does it"))))
    assert template.render([USER], shown).startswith("f: 0g: does it0")
