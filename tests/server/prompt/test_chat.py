from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.server.prompt.chat import Chat, ChatTemplate, load_chat
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.text.message import ChatMessage
from enginehouse.server.text.reasoning import THINK
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from makers.templates import TEMPLATES
from makers.text_engine import CHATML, byte_level_tokenizer, write_text_engine

USER, ASSISTANT, LATER = (
    ChatMessage("user", "hello"),
    ChatMessage("assistant", "hi"),
    ChatMessage("user", "bye"),
)
SYSTEM = ChatMessage("system", "be brief")
TOOL = ChatMessage("tool", "42", None, "call0")

SYSTEM_FIRST = (  # as Llama 2's: the system message is read from the front, else refused
    "{% if messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}"
)


def refusal(template: ChatTemplate, *messages: ChatMessage) -> RequestError:
    with pytest.raises(RequestError) as caught:
        template.render(template.arrange(messages))
    assert caught.value.status == 400
    return caught.value


def test_a_system_message_stays_where_it_is_when_the_template_takes_it_there() -> None:
    template = ChatTemplate(CHATML, {})
    assert template.keeps_system and template.keeps_tool and template.system_anywhere
    messages = [USER, ASSISTANT, SYSTEM, LATER, SYSTEM]
    assert template.arrange(messages) == messages


def test_a_late_system_message_moves_to_the_front_when_the_template_knows_no_other_place() -> None:
    template = ChatTemplate(SYSTEM_FIRST, {})
    assert template.keeps_system and not template.system_anywhere
    messages = [USER, ASSISTANT, SYSTEM, LATER]
    assert template.arrange(messages) == [SYSTEM, USER, ASSISTANT, LATER]
    assert template.render(template.arrange(messages)) == "<<be brief>>[hello][hi][bye]"
    assert refusal(template, SYSTEM, USER, SYSTEM).param == "messages[2].role"


def test_messages_the_template_would_drop_are_refused() -> None:
    assert refusal(ChatTemplate(NO_SYSTEM, {}), USER, SYSTEM).param == "messages[1].role"
    assert refusal(ChatTemplate(SYSTEM_FIRST, {}), USER, TOOL).param == "messages[1].role"


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].content == 'hello' %}{{ raise_exception('not like this') }}{% endif %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__subclasses__() }}",
    ],
)
def test_a_template_s_own_error_is_the_request_s(source: str) -> None:
    error = refusal(ChatTemplate(source, {}), USER)
    assert error.param == "messages"
    assert "chat template" in error.message


def test_templates_have_the_tools_transformers_gives_them() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{% generation %}({{ m is defined }}){% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{{ tools }}{{ add_generation_prompt }}"
    )
    message = ChatMessage("user", "<é>", name="bob")
    text = ChatTemplate(source, {"bos_token": "<s>"}).render([message, USER])
    assert text == '<s>{"role": "user", "content": "<é>", "name": "bob"}(False)4NoneTrue'


def test_rendering_equals_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    chat = Chat(byte_level_tokenizer(), ChatTemplate(CHATML, {}))
    messages = [SYSTEM, USER, ASSISTANT, LATER]
    expected = tokenizer.apply_chat_template(
        [message.to_template() for message in messages],
        chat_template=CHATML,
        add_generation_prompt=True,
        tokenize=False,
    )
    prompt = chat.prompt(messages, 1000)
    assert prompt.text == expected
    assert prompt.ids == tokenizer.encode(expected, add_special_tokens=False)


CONFIGS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"chat_template": "a{{ eos_token }}", "eos_token": "<|im_end|>"}, None, "a<|im_end|>"),
    ({"chat_template": "a", "eos_token": {"content": "z"}}, "b{{ eos_token }}", "bz"),
    (
        {"chat_template": [{"name": "x", "template": "n"}, {"name": "default", "template": "d"}]},
        None,
        "d",
    ),
]


@pytest.mark.parametrize(("config", "jinja", "text"), CONFIGS)
def test_the_template_is_found_where_a_checkpoint_may_keep_it(
    tmp_path: Path, config: dict[str, Any], jinja: str | None, text: str
) -> None:
    write_text_engine(tmp_path, jinja)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat(tmp_path).prompt([USER], 1000).text == text


def test_every_end_of_turn_token_stops_a_sequence(tmp_path: Path) -> None:
    tokenizer = write_text_engine(tmp_path)
    chat = load_chat(tmp_path)
    assert chat.stop_token_ids == (0, tokenizer.token_to_id("<|im_end|>"))


def test_an_engine_without_a_template_refuses_chat_and_says_so(tmp_path: Path) -> None:
    write_text_engine(tmp_path, template=None)
    with pytest.raises(RequestError, match="no chat template"):
        load_chat(tmp_path).prompt([USER], 1000)


def test_an_engine_whose_text_files_are_bad_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tokenizer.json is missing"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match="tokenizer.json cannot be used"):
        load_chat(tmp_path)
    write_text_engine(tmp_path, "{% for %}")
    with pytest.raises(EngineError, match="does not compile"):
        load_chat(tmp_path)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_text_engine(tmp_path)
    chat = load_chat(tmp_path)
    num_tokens = len(chat.prompt([USER], 1000).ids)
    assert len(chat.prompt([USER], num_tokens + 1).ids) == num_tokens
    with pytest.raises(RequestError, match=f"has {num_tokens} tokens.* is {num_tokens} ") as e:
        chat.prompt([USER], num_tokens)
    assert (e.value.param, e.value.code) == ("messages", "context_length_exceeded")


def test_a_hopelessly_long_prompt_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    write_text_engine(tmp_path)
    with pytest.raises(RequestError, match="has 50.* characters, .* is 100 ") as caught:
        load_chat(tmp_path).prompt([ChatMessage("user", "x" * 50_000)], 100)
    assert caught.value.code == "context_length_exceeded"


UNDER_GEVENT = """
from gevent import monkey
monkey.patch_all()
from gevent.monkey import get_original
from enginehouse.runtime.errors import RequestError
from enginehouse.server.prompt.chat import call_beside_the_loop
native_id = get_original("threading", "get_native_id")
assert call_beside_the_loop(native_id) != native_id()
def refuse():
    raise RequestError("no", param="x")
try:
    call_beside_the_loop(refuse)
except RequestError as error:
    print(error.param)
"""


def test_under_gevent_slow_work_leaves_the_loop_and_a_refusal_comes_back_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNDER_GEVENT], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x\n", "", 0)


def test_an_engine_is_opened_with_its_formats(tmp_path: Path) -> None:
    write_text_engine(tmp_path, TEMPLATES["hermes"])
    form = load_chat(tmp_path).tool_format
    assert form is not None and form.name == "hermes"
    chat = load_chat(tmp_path, "mistral", "think")
    assert chat.tool_format is not None and chat.tool_format.name == "mistral"
    assert chat.marks == THINK


def test_the_template_named_tool_use_is_for_requests_with_tools(tmp_path: Path) -> None:
    write_text_engine(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = [
        {"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": "<tool_call>{{ tools[0].function.name }}"},
    ]
    path.write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    chat = load_chat(tmp_path)
    assert chat.tool_format is not None and chat.tool_format.name == "hermes"
    shown = PromptOptions(tools=ToolUse((ToolFunction("f"),)))
    assert chat.render([USER]) == f"plain {USER.content}"
    assert chat.render([USER], shown) == "<tool_call>f"
