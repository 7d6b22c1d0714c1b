"""Tools, calls and results as plain messages, for chat templates that know none of them.

This file does not know any template or format of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from enginehouse.server.text.message import ChatMessage
from enginehouse.server.tools.format import Format, ToolFunction


def calls_as_text(messages: Sequence[ChatMessage], form: Format) -> list[ChatMessage]:
    """The conversation with calls as the model would have written them; results stay."""
    return [
        replace(
            message,
            content=_joined("\n", message.content, form.call_text(message.tool_calls)),
            tool_calls=(),
        )
        if message.tool_calls
        else message
        for message in messages
    ]


def as_text(
    messages: Sequence[ChatMessage],
    form: Format,
    functions: Sequence[ToolFunction],
    keeps_system: bool = True,
) -> list[ChatMessage]:
    """The conversation in messages of system, user and assistant alone.

    The functions follow the system message, or begin the first user message where a template has
    no system message. Calls are what the model would have written; results, with the user's words
    that follow them, are one message of the user.
    """
    plain: list[ChatMessage] = []
    names: dict[str, str] = {}
    after_result = False
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        [message] = calls_as_text([message], form)
        is_result = message.role == "tool"
        if is_result:
            name = names.get(message.tool_call_id or "", message.name or "the call")
            message = ChatMessage("user", f"Result of {name}:\n{message.content}")
        if after_result and message.role == "user":
            content = _joined("\n\n", plain[-1].content, message.content)
            plain[-1] = replace(plain[-1], content=content)
        else:
            plain.append(message)
        after_result = is_result
    return _told(plain, form.system_text(functions), keeps_system) if functions else plain


def _told(messages: list[ChatMessage], text: str, keeps_system: bool) -> list[ChatMessage]:
    if keeps_system and messages[0].role != "system":
        return [ChatMessage("system", text), *messages]
    role = "system" if keeps_system else "user"
    index = next((i for i, message in enumerate(messages) if message.role == role), None)
    if index is None:
        return [ChatMessage(role, text), *messages]
    words = (messages[index].content, text) if keeps_system else (text, messages[index].content)
    told = replace(messages[index], content=_joined("\n\n", *words))
    return [*messages[:index], told, *messages[index + 1 :]]


def _joined(between: str, *texts: str) -> str:
    return between.join(text for text in texts if text)
