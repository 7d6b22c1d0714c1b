"""The format of calls is chosen from a template, or named."""

from __future__ import annotations

import pytest

from enginehouse.build.plan.settings import BuildSettings
from enginehouse.server.formats.choose import TOOL_FORMATS, choose_format
from enginehouse.server.text.message import ToolCall
from enginehouse.server.text.reasoning import REASONING_FORMATS
from makers.templates import TEMPLATES
from makers.text_engine import CHATML


def test_the_format_is_chosen_from_the_template() -> None:
    chosen = {name: choose_format(source) for name, source in TEMPLATES.items()}
    names = {name: form.name for name, form in chosen.items() if form is not None}
    assert names == {
        "hermes": "hermes",
        "llama3_json": "llama3_json",
        "mistral": "mistral",
        "mistral_named": "mistral",
        "reasoning": "json",
    }
    call = [ToolCall("", "f", {})]
    assert chosen["mistral"] and chosen["mistral_named"]
    assert chosen["mistral"].call_text(call) == '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
    assert chosen["mistral_named"].call_text(call) == "[TOOL_CALLS]f[ARGS]{}"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<｜tool▁calls▁begin｜>' + '```json' }}", "deepseek_v3"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", "deepseek_v31"),
        ("{{ '<|tool|>' + x + '<|/tool|>' }}", "phi4_mini"),
        ("{{ '<tool_call><function=' }}", "qwen3_coder"),
        ("{{ '<tool_call>' }}", "hermes"),  # as Granite 4's
        ("{{ '<|observation|>' + '<arg_key>' }}", "glm45"),
        ("{{ '<|observation|>' }}", "glm4"),
        ("{{ '<|tool_list_start|>' }}", "lfm2"),  # LFM2 without its 2.5
    ],
)
def test_alike_formats_are_told_apart(template: str, name: str) -> None:
    form = choose_format(template)
    assert form is not None and form.name == name


def test_hunyuan_is_held_to_the_form_its_template_asks_for() -> None:
    call = [ToolCall("", "f", {})]
    block, listed = choose_format("<tool_calls><tool_call>"), choose_format('<tool_calls>[{"name"')
    assert block and listed and block.name == listed.name == "hunyuan"
    text = "<tool_calls><tool_call>f\n```json\n{}\n```</tool_call></tool_calls>"
    assert block.call_text(call) == text
    assert listed.call_text(call) == '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>'


def test_the_format_can_be_named() -> None:
    for wanted in TOOL_FORMATS:
        for template in (None, CHATML, *TEMPLATES.values()):
            form = choose_format(template, wanted)
            assert (form is None) == (wanted == "none")
            assert wanted == "auto" or form is None or form.name == wanted
    with pytest.raises(ValueError, match="is no format"):
        choose_format(None, "openai")


def test_build_and_server_know_the_same_formats() -> None:
    fields = BuildSettings.__dataclass_fields__
    assert fields["tool_format"].metadata["choices"] == TOOL_FORMATS
    assert fields["reasoning_format"].metadata["choices"] == REASONING_FORMATS
