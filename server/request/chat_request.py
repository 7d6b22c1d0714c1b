"""Chat bodies -> ChatRequest: what a well-formed request may ask for; a refusal names its `param`.

This file does not know Flask, the model or its chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from enginehouse.runtime.errors import RequestError
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.request.asked import Asked, check_min_tokens, read_common
from enginehouse.server.text.message import ChatMessage, ToolCall
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from enginehouse.server.wire.bodies import (
    CalledTool,
    ChatBody,
    Message,
    NamedTool,
    TemplateFields,
    Tool,
)
from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refusal import WANTED_FIELD, parse_body, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Asked):
    """A chat request that is legal in every field.

    options has the tools. separate_reasoning None: as the engine does.
    """

    messages: tuple[ChatMessage, ...]
    options: PromptOptions
    separate_reasoning: bool | None
    include_reasoning: bool


def parse_chat_request(body: bytes, max_messages: int | None = None) -> ChatRequest:
    """Read one request body; RequestError names the first field at fault.

    max_messages: the context's length, as every message takes a token at least.
    """
    shape = parse_body(ChatBody, body, lambda data: check_num_messages(data, max_messages))
    common = read_common(shape)
    messages, options = read_conversation(shape)
    max_tokens = _max_tokens(shape)
    check_min_tokens(shape.min_tokens, max_tokens)
    if shape.top_logprobs and not shape.logprobs:
        refuse("top_logprobs", "found without logprobs; wanted logprobs true")
    return ChatRequest(
        **common,
        max_tokens=max_tokens,
        num_logprobs=shape.top_logprobs if shape.logprobs else None,
        messages=messages,
        options=replace(options, tools=_tool_use(shape)),
        separate_reasoning=shape.separate_reasoning,
        include_reasoning=shape.include_reasoning,
    )


def check_num_messages(data: dict[str, Any], max_messages: int | None) -> None:
    """What no context can hold is refused before each message is looked at."""
    messages = data.get("messages")
    if max_messages is not None and isinstance(messages, list) and len(messages) > max_messages:
        refuse(
            "messages",
            f"found {len(messages)} messages; wanted at most {max_messages}, as each takes a token "
            f"and more of the context of {max_messages} tokens",
            "context_length_exceeded",
        )


def read_conversation(shape: TemplateFields) -> tuple[tuple[ChatMessage, ...], PromptOptions]:
    """The messages and how they become a prompt; RequestError when they are no conversation."""
    messages = tuple(
        _message(message, f"messages[{index}]") for index, message in enumerate(shape.messages)
    )
    if shape.continue_final_message and shape.add_generation_prompt:
        refuse("add_generation_prompt", "contradicts continue_final_message; wanted one of the two")
    opens_a_turn = not shape.continue_final_message and shape.add_generation_prompt is not False
    _check_conversation(messages, opens_a_turn, shape.continue_final_message)
    options = PromptOptions(opens_a_turn, shape.continue_final_message, shape.chat_template_kwargs)
    return messages, options


def _message(message: Message, path: str) -> ChatMessage:
    for name, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and message.role != role:
            refuse(f"{path}.{name}", f'found with role "{message.role}"; wanted role "{role}"')
    if not message.content and not message.tool_calls:
        _missing(f"{path}.content", WANTED_FIELD["content"])
    if message.role == "tool" and not message.tool_call_id:
        _missing(f"{path}.tool_call_id", "the id of the tool call this message answers")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content="\n".join(part.text for part in message.content),
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=tuple(
            _call_made(call, f"{path}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls)
        ),
        reasoning_content=message.reasoning_content,
    )


def _call_made(call: CalledTool, path: str) -> ToolCall:
    text = call.function.arguments
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        refuse(
            f"{path}.function.arguments",
            f"found {found_text(text)}; wanted the text of a JSON object",
        )
    return ToolCall(call.id, call.function.name, arguments)


def _check_conversation(
    messages: tuple[ChatMessage, ...], opens_a_turn: bool, continues: bool
) -> None:
    """The page's grammar: (user,assistant,tool)*,user and system messages anywhere.

    A conversation may also end with a tool's answer, as it does whenever a tool was called; and
    with an assistant's message, when that one is continued or no turn is opened.
    """
    if not any(message.role == "user" for message in messages):
        raise RequestError(
            "messages: found no user message; wanted at least one",
            param="messages",
            code="invalid_value",
        )
    final = messages[-1]
    if continues and (final.role != "assistant" or final.tool_calls):
        refuse(
            "continue_final_message",
            f'the final message has role "{final.role}"; wanted text of the assistant',
        )
    turns = [(index, item.role) for index, item in enumerate(messages) if item.role != "system"]
    index, role = turns[-1]
    if opens_a_turn and role not in ("user", "tool"):
        refuse(
            f"messages[{index}].role",
            f'the last message that is not a system message has role "{role}"; wanted "user" or '
            '"tool", or continue_final_message',
        )


def read_tools(tools: Sequence[Tool]) -> tuple[ToolFunction, ...]:
    """The functions as prompts and grammars take them."""
    functions = [tool.function for tool in tools]
    return tuple(
        ToolFunction(item.name, item.description, item.parameters or None, item.strict)
        for item in functions
    )


def _tool_use(shape: ChatBody) -> ToolUse:
    choice = shape.tool_choice
    functions, parallel = read_tools(shape.tools), shape.parallel_tool_calls
    if isinstance(choice, NamedTool):
        return ToolUse(functions, "required", choice.function.name, parallel)
    return ToolUse(functions, choice or "auto", None, parallel)


def _max_tokens(shape: ChatBody) -> int | None:
    """max_completion_tokens is OpenAI's newer name for the same limit."""
    old, new = shape.max_tokens, shape.max_completion_tokens
    if old is not None and new is not None and old != new:
        refuse(
            "max_completion_tokens",
            f"{new} contradicts max_tokens: {old}; wanted one of the two, or both equal",
        )
    return old if new is None else new


def _missing(param: str, wanted: str) -> None:
    refuse(param, f"missing; wanted {wanted}", "missing_required_parameter")
