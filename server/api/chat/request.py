"""Chat bodies -> ChatRequest: what a well-formed request may ask for; a refusal names its `param`.

This file does not know Flask, the model or its chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.request.asked import check_min_tokens, read_common
from enginehouse.server.request.chat_request import ChatRequest
from enginehouse.server.request.earlier_calls import call_made
from enginehouse.server.text.message import ChatMessage
from enginehouse.server.tools.format import ToolFunction
from enginehouse.server.tools.tool_choice import ToolUse
from enginehouse.server.wire.bodies import (
    ChatBody,
    Message,
    NamedTool,
    TemplateFields,
    Tool,
)
from enginehouse.server.wire.refusal import WANTED_FIELD, parse_body, refuse


def parse_chat_request(body: bytes, max_messages: int | None = None) -> ChatRequest:
    """Read one request body; RequestError names the first field at fault.

    max_messages: the context's length, as every message takes a token at least.
    """
    shape = parse_body(ChatBody, body, lambda data: check_num_messages(data, max_messages))
    common = read_common(shape)
    conversation = read_conversation(shape)
    max_tokens = _max_tokens(shape)
    check_min_tokens(shape.min_tokens, max_tokens)
    if shape.top_logprobs and not shape.logprobs:
        refuse("top_logprobs", "found without logprobs; wanted logprobs true")
    return ChatRequest(
        **common,
        max_tokens=max_tokens,
        num_logprobs=shape.top_logprobs if shape.logprobs else None,
        messages=conversation.messages,
        repaired=conversation.repaired,
        options=replace(
            conversation.options, reasoning_effort=shape.reasoning_effort, tools=_tool_use(shape)
        ),
        separate_reasoning=shape.separate_reasoning,
        include_reasoning=shape.include_reasoning,
    )


def check_num_messages(data: dict[str, Any], max_messages: int | None) -> None:
    """What no context can hold is refused before each message is looked at."""
    messages = data.get("messages")
    if max_messages is not None and isinstance(messages, list) and len(messages) > max_messages:
        refuse(
            "messages",
            f"the prompt is too long: found {len(messages)} messages, each of a token and more, "
            f"and this model's maximum context length is {max_messages} tokens",
            "context_length_exceeded",
        )


class Conversation(NamedTuple):
    """Messages as a template reads them. repaired: paths of what could not be taken as it came."""

    messages: tuple[ChatMessage, ...]
    options: PromptOptions
    repaired: tuple[str, ...]


def read_conversation(shape: TemplateFields) -> Conversation:
    """The messages and how they become a prompt; RequestError when they are no conversation.

    Any order of roles is taken that the chat template takes. An assistant's message at the end is
    followed by a new turn, or continued where the request says so.
    """
    repaired: list[str] = []
    messages: list[ChatMessage] = []
    for index, message in enumerate(shape.messages):
        path = f"messages[{index}]"
        if message.prefix and (message.role != "assistant" or index < len(shape.messages) - 1):
            refuse(f"{path}.prefix", "found before the end; wanted on an assistant's final message")
        messages.append(_message(message, path, index, repaired))
    messages = _with_function_ids(messages)
    continues = shape.continue_final_message or shape.messages[-1].prefix
    if continues and shape.add_generation_prompt:
        refuse("add_generation_prompt", "contradicts continue_final_message; wanted one of the two")
    final = messages[-1]
    if continues and (final.role != "assistant" or final.tool_calls):
        refuse(
            "continue_final_message",
            f'the final message has role "{final.role}"; wanted text of the assistant',
        )
    opens_a_turn = not continues and shape.add_generation_prompt is not False
    options = PromptOptions(opens_a_turn, continues, shape.chat_template_kwargs)
    return Conversation(tuple(messages), options, tuple(repaired))


def _message(message: Message, path: str, index: int, repaired: list[str]) -> ChatMessage:
    for name, role in (
        ("tool_calls", "assistant"),
        ("function_call", "assistant"),
        ("reasoning_content", "assistant"),
        ("reasoning", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and message.role != role:
            refuse(f"{path}.{name}", f'found with role "{message.role}"; wanted role "{role}"')
    is_empty = "content" not in message.model_fields_set
    if is_empty and message.role != "assistant":
        _missing(f"{path}.content", WANTED_FIELD["content"])
    if message.role == "tool" and not message.tool_call_id:
        _missing(f"{path}.tool_call_id", "the id of the tool call this message answers")
    if message.role == "function" and not message.name:
        _missing(f"{path}.name", "the name of the function this message answers")
    content = "\n".join(part.text for part in message.content)
    calls = [
        call_made(
            call.id,
            call.function.name,
            call.function.arguments,
            f"{path}.tool_calls[{number}].function.arguments",
            repaired,
        )
        for number, call in enumerate(message.tool_calls)
    ]
    if (older := message.function_call) is not None:
        place = f"{path}.function_call.arguments"
        calls.append(call_made(f"call_{index}", older.name, older.arguments, place, repaired))
    return ChatMessage(
        role={"developer": "system"}.get(message.role, message.role),
        content=content or (message.refusal or ""),
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=tuple(calls),
        reasoning_content=message.reasoning_content or message.reasoning,
    )


def _with_function_ids(messages: list[ChatMessage]) -> list[ChatMessage]:
    """A message of role function as the tool's answer to the last call of that name."""
    calls: dict[str, str] = {}
    linked: list[ChatMessage] = []
    for message in messages:
        calls |= {call.name: call.id for call in message.tool_calls}
        if message.role == "function":
            call_id = calls.get(message.name or "", "call_0")
            message = replace(message, role="tool", tool_call_id=call_id)
        linked.append(message)
    return linked


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
