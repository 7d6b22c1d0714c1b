"""A Responses body, and the items that came before it -> the one request for an answer.

This file does not know Flask, where earlier items are kept, or the model's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from enginehouse.server.api.chat.request import check_num_messages
from enginehouse.server.api.responses.body import (
    AllowedTools,
    FunctionChoice,
    FunctionTool,
    Item,
    ItemText,
    ResponsesBody,
    TextFormat,
    full_name,
)
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.request.asked import check_min_tokens, ignored_fields, read_common
from enginehouse.server.request.chat_request import ChatRequest
from enginehouse.server.request.earlier_calls import call_made
from enginehouse.server.request.own_names import own_names
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from enginehouse.server.wire.refusal import parse_body, refuse
from enginehouse.server.wire.refused_fields import instead_of
from enginehouse.server.wire.shapes import JsonSchema, ResponseFormat

# What chat, and what all endpoints share, calls these fields.
OWN_NAMES = (
    (r"messages", "input"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"max_tokens", "max_output_tokens"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"tool_choice\.function", "tool_choice"),
)
_LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest(ChatRequest):
    """body: with what of it is told again in the response."""

    body: ResponsesBody


def parse_responses_body(body: bytes, max_items: int | None = None) -> ResponsesBody:
    """RequestError names the first field at fault. max_items: as every item takes a token."""

    def check(data: dict[str, Any]) -> None:
        with own_names(OWN_NAMES):
            check_num_messages({"messages": data.get("input")}, max_items)

    shape = parse_body(ResponsesBody, body, check)
    ignored_fields(shape)  # refuses by the body's own names: after this, messages are the input
    for name in shape.foreign:
        if getattr(shape, name) != type(shape).model_fields[name].default:
            refuse(name, f"is not of this endpoint; {instead_of(name)}", "unsupported_parameter")
    if shape.background and not shape.store:
        refuse("background", "found with store false; wanted store true, to be asked for it later")
    if shape.background and shape.stream:
        refuse("background", "found with stream; wanted one of the two")
    if shape.conversation is not None and not shape.store:
        refuse("conversation", "contradicts store false, as the conversation keeps the response")
    if shape.conversation is not None and shape.previous_response_id is not None:
        refuse("conversation", "contradicts previous_response_id; wanted one of the two")
    return shape


def responses_request(body: ResponsesBody, past: Sequence[Item] = ()) -> ResponsesRequest:
    """past: the items of the conversation that the body goes on with, none of them a reference."""
    shape = body.model_copy(update={"response_format": _response_format(body.text.format)})
    common = read_common(shape)
    check_min_tokens(shape.min_tokens, shape.max_output_tokens)
    repaired: list[str] = []
    messages = read_items([*past, *body.input], len(past), repaired)
    if body.instructions:
        messages.insert(0, ChatMessage("system", body.instructions))
    if not messages:
        refuse("input", "found no item; wanted at least one")
    tells_logprobs = _LOGPROBS in body.include or body.top_logprobs > 0
    ignored = [*common.pop("ignored_fields")]
    if body.text.verbosity is not None:
        ignored.append("text.verbosity")
    if body.max_tool_calls is not None:
        ignored.append("max_tool_calls")
    if any(name != _LOGPROBS for name in body.include):
        ignored.append("include")
    if body.reasoning.summary or body.reasoning.generate_summary:
        ignored.append("reasoning.summary")
    return ResponsesRequest(
        **common,
        body=body,
        ignored_fields=tuple(ignored),
        max_tokens=body.max_output_tokens,
        num_logprobs=body.top_logprobs if tells_logprobs else None,
        messages=tuple(messages),
        repaired=tuple(repaired),
        options=PromptOptions(
            variables=body.chat_template_kwargs,
            reasoning_effort=body.reasoning.effort,
            tools=tool_use(body),
        ),
        separate_reasoning=None,
        include_reasoning=True,
        truncates=body.truncation == "auto",
        names=OWN_NAMES,
    )


def read_items(items: Sequence[Item], num_past: int, repaired: list[str]) -> list[ChatMessage]:
    """Messages as a template reads them: what the assistant thought, said and called in one turn is
    one message. num_past: so many of the items are not the body's own.
    """
    messages: list[ChatMessage] = []
    turn: ChatMessage | None = None  # the assistant's, that is still being put together
    for index, item in enumerate(items):
        path = f"input[{max(0, index - num_past)}]"
        added = _assistants(item, path, repaired)
        if added is not None and turn is not None and _goes_on(turn, added):
            turn = _joined(turn, added)
            continue
        if turn is not None:
            messages.append(turn)
        turn = added
        if added is None:
            messages.append(_others(item, path))
    return messages if turn is None else [*messages, turn]


def tool_use(body: ResponsesBody) -> ToolUse:
    """Of allowed_tools the model is told, and of no others."""
    functions, choice = tuple(map(_function, body.tools)), body.tool_choice
    if isinstance(choice, FunctionChoice):
        return ToolUse(functions, "required", choice.name, body.parallel_tool_calls)
    if isinstance(choice, AllowedTools):
        names = [tool.name for tool in choice.tools]
        known = {function.name for function in functions}
        for index, name in enumerate(names):
            if name not in known:
                refuse(f"tool_choice.tools[{index}].name", f'"{name}" is none of the tools')
        functions = tuple(function for function in functions if function.name in names)
        choice = choice.mode
    return ToolUse(functions, choice, None, body.parallel_tool_calls)


def _function(tool: FunctionTool) -> ToolFunction:
    return ToolFunction(tool.full_name, tool.description, tool.parameters or None, tool.strict)


def _response_format(wanted: TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.name is None:
        refuse("text.format.name", "missing; wanted a name", "missing_required_parameter")
    if wanted.schema_ is None:
        refuse("text.format.schema", "missing; wanted a JSON schema", "missing_required_parameter")
    given = wanted.model_dump(include={"name", "description", "schema_", "strict"}, by_alias=True)
    schema = JsonSchema.model_validate(given)
    return ResponseFormat(type="json_schema", json_schema=schema)


def _assistants(item: Item, path: str, repaired: list[str]) -> ChatMessage | None:
    """What the assistant thought, said or called; None for what others said."""
    match item.type:
        case "reasoning":
            thought = _text(item.content) or _text(item.summary)
            return ChatMessage("assistant", "", reasoning_content=thought or None)
        case "function_call":
            call_id = _needed(item, path, "call_id")
            name = full_name(item.namespace, _needed(item, path, "name"))
            call = call_made(call_id, name, item.arguments, f"{path}.arguments", repaired)
            return ChatMessage("assistant", "", tool_calls=(call,))
        case "message" if item.role == "assistant":
            return ChatMessage("assistant", _text(item.content))
    return None


def _others(item: Item, path: str) -> ChatMessage:
    if item.type == "function_call_output":
        if "output" not in item.model_fields_set:
            refuse(f"{path}.output", "missing; wanted a string", "missing_required_parameter")
        call_id = _needed(item, path, "call_id")
        return ChatMessage("tool", _text(item.output), tool_call_id=call_id)
    assert item.type == "message", "references are looked up before"
    role = _needed(item, path, "role")
    if "content" not in item.model_fields_set:
        refuse(
            f"{path}.content",
            "missing; wanted a string or a list of text parts",
            "missing_required_parameter",
        )
    return ChatMessage("system" if role == "developer" else role, _text(item.content))


def _goes_on(turn: ChatMessage, added: ChatMessage) -> bool:
    """A turn is thought, then words, then calls."""
    return bool(added.tool_calls) or not (turn.content or turn.tool_calls)


def _joined(turn: ChatMessage, added: ChatMessage) -> ChatMessage:
    thoughts = [each.reasoning_content for each in (turn, added) if each.reasoning_content]
    calls: tuple[ToolCall, ...] = (*turn.tool_calls, *added.tool_calls)
    return replace(
        turn,
        content=turn.content or added.content,
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls,
    )


def _needed(item: Item, path: str, name: str) -> str:
    value: str | None = getattr(item, name)
    if not value:
        refuse(
            f"{path}.{name}", f"missing of a {item.type}; wanted one", "missing_required_parameter"
        )
    return value


def _text(parts: Sequence[ItemText]) -> str:
    return "\n".join(part.text or part.refusal for part in parts)
