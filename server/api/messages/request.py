"""A Messages body -> the one request for an answer to a conversation.

This file does not know Flask, the model or its chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from enginehouse.server.api.chat.request import check_num_messages
from enginehouse.server.api.messages.body import (
    Block,
    CountBody,
    MessagesBody,
    TextBlock,
    ToolDefinition,
    TurnMessage,
)
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.request.asked import ignored_fields, read_common
from enginehouse.server.request.chat_request import ChatRequest
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from enginehouse.server.wire.refusal import parse_body, refuse
from enginehouse.server.wire.shapes import JsonSchema, ResponseFormat, SamplingFields

# What chat, and what all endpoints share, calls these fields.
OWN_NAMES = (
    (r"stop\b", "stop_sequences"),
    (r"response_format\.json_schema", "output_config.format"),
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"tool_choice\.function", "tool_choice"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "required"}


def parse_messages_request(body: bytes, max_messages: int | None = None) -> ChatRequest:
    """RequestError names the first field at fault. max_messages: as each takes a token."""
    shape = parse_body(MessagesBody, body, lambda data: check_num_messages(data, max_messages))
    fields = SamplingFields(
        model=shape.model,
        stream=shape.stream,
        temperature=shape.temperature,
        top_p=shape.top_p,
        top_k=shape.top_k,
        stop=shape.stop_sequences,
        response_format=_response_format(shape),
    )
    return _request(shape, read_common(fields), shape.max_tokens)


def parse_count_request(body: bytes, max_messages: int | None = None) -> ChatRequest:
    """The same of what is counted alone."""
    shape = parse_body(CountBody, body, lambda data: check_num_messages(data, max_messages))
    return _request(shape, read_common(SamplingFields(model=shape.model)), None)


def _request(shape: CountBody, common: dict[str, Any], max_tokens: int | None) -> ChatRequest:
    thinks = shape.thinking.type != "disabled"
    final, ignored = shape.messages[-1], [*ignored_fields(shape)]
    if shape.thinking.budget_tokens is not None:
        ignored.append("thinking.budget_tokens")
    continues = final.role == "assistant" and all(block.type == "text" for block in final.content)
    effort = shape.output_config.effort
    return ChatRequest(
        **{**common, "ignored_fields": tuple(ignored)},
        max_tokens=max_tokens,
        num_logprobs=None,
        messages=tuple(read_messages(shape)),
        repaired=(),
        options=PromptOptions(
            add_generation_prompt=not continues,
            continue_final_message=continues,
            reasoning_effort=("xhigh" if effort == "max" else effort) if thinks else "none",
            tools=tool_use(shape),
        ),
        separate_reasoning=None,
        include_reasoning=thinks and shape.thinking.display != "omitted",
        names=(*OWN_NAMES, ("reasoning_effort", "" if effort is None else "output_config.effort")),
    )


def read_messages(shape: CountBody) -> list[ChatMessage]:
    """Messages as a template reads them: each result of a call is one of its own, before the words
    that came with it.
    """
    system = _text(shape.system)
    messages = [ChatMessage("system", system)] if system else []
    for index, message in enumerate(shape.messages):
        path = f"messages[{index}]"
        if message.role == "assistant":
            messages.append(_assistants(message, path))
        else:
            messages += _others(message, path)
    return messages


def tool_use(shape: CountBody) -> ToolUse:
    functions, choice = tuple(map(_function, shape.tools)), shape.tool_choice
    if (choice.type == "tool") != (choice.name is not None):
        refuse("tool_choice.name", 'wanted with type "tool", and with no other')
    mode, parallel = _CHOICES[choice.type], not choice.disable_parallel_tool_use
    return ToolUse(functions, mode, choice.name, parallel)


def _function(tool: ToolDefinition) -> ToolFunction:
    return ToolFunction(tool.name, tool.description, tool.input_schema or None, tool.strict)


def _response_format(shape: MessagesBody) -> ResponseFormat:
    wanted = shape.output_config.format or shape.output_format
    if wanted is None:
        return ResponseFormat(type="text")
    schema = JsonSchema.model_validate({"name": "answer", "schema": wanted.schema_})
    return ResponseFormat(type="json_schema", json_schema=schema)


def _assistants(message: TurnMessage, path: str) -> ChatMessage:
    calls = []
    for number, block in enumerate(message.content):
        if block.type == "tool_result":
            refuse(f"{path}.content[{number}].type", '"tool_result" is of role "user"')
        if block.type == "tool_use":
            place = f"{path}.content[{number}]"
            call_id, name = _needed(block, place, "id"), _needed(block, place, "name")
            calls.append(ToolCall(call_id, name, block.input))
    thoughts = [block.thinking for block in message.content if block.type == "thinking"]
    return ChatMessage(
        "assistant",
        _text(message.content),
        tool_calls=tuple(calls),
        reasoning_content="\n".join(filter(None, thoughts)) or None,
    )


def _others(message: TurnMessage, path: str) -> list[ChatMessage]:
    results = []
    for number, block in enumerate(message.content):
        if block.type not in ("text", "tool_result"):
            place = f"{path}.content[{number}].type"
            refuse(place, f'"{block.type}" is of role "assistant"')
        if block.type == "tool_result":
            call_id = _needed(block, f"{path}.content[{number}]", "tool_use_id")
            text = _text(block.content)
            told = f"Error: {text}" if block.is_error else text
            results.append(ChatMessage("tool", told, tool_call_id=call_id))
    text = _text(message.content)
    return results if results and not text else [*results, ChatMessage(message.role, text)]


def _needed(block: Block, path: str, name: str) -> str:
    value: str | None = getattr(block, name)
    if not value:
        refuse(
            f"{path}.{name}", f"missing of a {block.type}; wanted one", "missing_required_parameter"
        )
    return value


def _text(blocks: Sequence[TextBlock] | Sequence[Block]) -> str:
    return "\n".join(block.text for block in blocks if block.type == "text")
