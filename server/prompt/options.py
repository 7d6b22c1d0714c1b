"""How a request's messages become a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from enginehouse.server.tools.tool_choice import ToolUse


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """add_generation_prompt: the opening of the assistant's turn follows the messages.

    continue_final_message: the prompt ends with the text of the last message; not together with
    the former. variables: more of them, for the chat template. reasoning_effort: a word that
    templates may read; "none" turns thinking off where they can. tools: what it shows the model.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    tools: ToolUse = ToolUse()


PLAIN_PROMPT = PromptOptions()
