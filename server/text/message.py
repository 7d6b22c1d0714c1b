"""One message of a conversation, and a call of a tool in it, as a chat template reads them.

This file does not know HTTP, any template, or how a model writes its calls.
Source: the conversation format of transformers' `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant made in an earlier turn. arguments: the object, not its JSON text.

    unread: the text that came in its place and is no object's; arguments is empty then.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    unread: str | None = None

    def to_template(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": dict(self.arguments)}
        return {"type": "function", "id": self.id, "function": function}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message with its text parts joined; role is system, user, assistant or tool.

    content is empty where a message has none, as one that only calls tools may.
    """

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_content: str | None = None

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template reads it: absent fields are absent, not None."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            fields["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            fields["tool_calls"] = [call.to_template() for call in self.tool_calls]
        return fields
