"""The one request for an answer to a conversation, whichever endpoint's body it was read from.

Every field is legal. This file does not know a body, Flask, the model or its chat template.
"""

from __future__ import annotations

from dataclasses import dataclass

from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.request.asked import Asked
from enginehouse.server.request.own_names import Names
from enginehouse.server.text.message import ChatMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Asked):
    """What is asked of the model.

    options has the tools. separate_reasoning None: as the engine does. repaired: the fields of
    the conversation that could not be taken as they came. truncates: the oldest messages that do
    not fit are left out, instead of refused. names: what chat's fields are in the body that it was
    read from; empty for what was not asked there.
    """

    messages: tuple[ChatMessage, ...]
    repaired: tuple[str, ...]
    options: PromptOptions
    separate_reasoning: bool | None
    include_reasoning: bool
    truncates: bool = False
    names: Names = ()
