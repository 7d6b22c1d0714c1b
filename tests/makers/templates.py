"""The chat templates of tests/data, by name, and what transformers makes of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enginehouse.server.text.message import ChatMessage
from enginehouse.server.tools.format import ToolFunction
from makers.paths import DATA
from makers.text_engine import byte_level_tokenizer


def _read(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = _read(DATA / "templates")
FAMILIES = _read(DATA / "templates" / "families")


def theirs(
    source: str,
    messages: Sequence[ChatMessage],
    tools: Sequence[ToolFunction],
    arguments_as_text: bool = False,
    **kwargs: Any,
) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    shown = [_shown(message, arguments_as_text) for message in messages]
    if "'metadata'" in source:
        shown = [_with_metadata(message) for message in shown]
    text = tokenizer.apply_chat_template(
        shown,
        chat_template=source,
        tools=[tool.to_template() for tool in tools] or None,
        tokenize=False,
        **kwargs,
    )
    assert isinstance(text, str)
    return text


def _shown(message: ChatMessage, arguments_as_text: bool) -> dict[str, Any]:
    """With the reasoning under the name of GPT-OSS and LFM2 too."""
    shown = message.to_template()
    if message.reasoning_content is not None:
        shown["thinking"] = message.reasoning_content
    for call in shown.get("tool_calls", ()) if arguments_as_text else ():
        arguments = call["function"]["arguments"]
        call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return shown


def _with_metadata(message: dict[str, Any]) -> dict[str, Any]:
    """A call and a result as GLM-4's own code has them."""
    if message["role"] == "tool":
        return {"role": "observation", "content": message["content"]}
    for call in message.pop("tool_calls", ()):
        message["metadata"] = call["function"]["name"]
        message["content"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return message
