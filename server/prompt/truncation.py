"""A conversation that is too long for the context -> the latest part of it that is not.

Knows no endpoint. Source: OpenAI's API reference, "Responses", `truncation: auto`.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginehouse.runtime.errors import RequestError
from enginehouse.server.prompt.chat import Chat, Prompt
from enginehouse.server.prompt.options import PromptOptions
from enginehouse.server.text.message import ChatMessage


def latest_that_fits(
    chat: Chat, messages: Sequence[ChatMessage], max_tokens: int, options: PromptOptions
) -> Prompt:
    """The prompt of all messages if it has fewer than max_tokens, else of as many of the latest as
    do. System messages at the head stay, a result stays with its call, the last message stays.

    RequestError when not even that fits.
    """
    head = next((i for i, each in enumerate(messages) if each.role != "system"), len(messages))
    starts = [i for i in range(head, len(messages)) if messages[i].role != "tool"]
    starts = starts or [head]
    fewest, most = 0, len(starts) - 1  # the first start that fits is looked for among these
    fitting: Prompt | None = None
    while fitting is None or fewest < most:
        middle = 0 if fitting is None and fewest == 0 else (fewest + most) // 2
        kept = [*messages[:head], *messages[starts[middle] :]]
        try:
            fitting = chat.prompt(kept, max_tokens, options)
            most = middle
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            if middle == len(starts) - 1:
                raise RequestError(
                    "messages: those that stay, the system messages at the head and the last, are "
                    f"too long for what the answer leaves: wanted fewer than {max_tokens} tokens; "
                    "shorten them, or ask for fewer tokens",
                    param="messages",
                    code=error.code,
                ) from None
            fewest = middle + 1
    return fitting
