"""What a chat completion's stream must be, to the letter, and what came in it.

Fed lines, as connection.py gives them; without I/O. A chat forgives more: see conversation.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from enginehouse.runtime.errors import EnginehouseError


class BrokenStream(EnginehouseError):
    """A stream that is not what the API promises."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer. Times are seconds: of each piece of text since it was asked, and of the end."""

    id: str
    text: str
    num_tokens: int
    finish_reason: str
    piece_times_s: tuple[float, ...]
    end_s: float  # time.monotonic


def parse_chunk(data: str) -> dict[str, Any]:
    """The object behind `data: `. Raises BrokenStream for an error in the stream, and for what is
    none.
    """
    try:
        chunk = json.loads(data)
        error = chunk.get("error")
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenStream(f"{data[:80]!r} is no chat.completion.chunk") from None
    if error:
        raise BrokenStream(f"error in the stream: {message}")
    found: dict[str, Any] = chunk
    return found


class StreamReader:
    """Takes a stream's data; raises BrokenStream at the first that does not belong there."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.finish_reason: str | None = None
        self.num_tokens: int | None = None
        self.done = False
        self.texts: list[str] = []
        self._role: str | None = None

    def push(self, line: str) -> str:
        """Take a line; returns the new piece of the answer, or ''."""
        if not line.startswith("data: "):
            raise BrokenStream(f"{line[:80]!r} is no data line")
        data = line.removeprefix("data: ")
        if self.done:
            raise BrokenStream(f"{data[:80]!r} came after [DONE]")
        if data == "[DONE]":
            self.done = True
            return ""
        chunk = parse_chunk(data)
        try:
            return self._take(chunk)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise BrokenStream(f"{data[:80]!r} is no chat.completion.chunk") from None

    def _take(self, chunk: dict[str, Any]) -> str:
        if chunk["object"] != "chat.completion.chunk":
            raise BrokenStream(f"object is {chunk['object']!r}; wanted chat.completion.chunk")
        if self.id is not None and chunk["id"] != self.id:
            raise BrokenStream(f"two ids in one stream: {self.id} and {chunk['id']}")
        self.id = str(chunk["id"])
        if not chunk["choices"]:
            if self.finish_reason is None:
                raise BrokenStream("usage came before finish_reason")
            self.num_tokens = int(chunk["usage"]["completion_tokens"])
            return ""
        [choice] = chunk["choices"]
        delta, text = choice["delta"], choice["delta"].get("content") or ""
        if self.finish_reason is not None:
            raise BrokenStream("a choice came after its finish_reason")
        if self._role is None:
            if delta.get("role") != "assistant":
                raise BrokenStream(f"the first delta is {delta}; wanted the assistant's role")
            self._role = "assistant"
        elif "role" in delta:
            raise BrokenStream("the role came twice")
        self.finish_reason = choice["finish_reason"]
        self.texts.append(text)
        return str(text)

    def check_end(self) -> None:
        wanted = {"finish_reason": self.finish_reason, "usage": self.num_tokens}
        missing = [name for name, value in wanted.items() if value is None]
        missing += [] if self.done else ["[DONE]"]
        if missing:
            raise BrokenStream(f"the stream ended without {', '.join(missing)}")


def read_stream(lines: Iterable[str], asked_s: float) -> Stream:
    """A whole stream, asked for at that time of time.monotonic. Raises BrokenStream."""
    reader, times = StreamReader(), []
    for line in lines:
        if reader.push(line):
            times.append(time.monotonic() - asked_s)
    reader.check_end()
    assert reader.id is not None and reader.finish_reason and reader.num_tokens is not None
    return Stream(
        id=reader.id,
        text="".join(reader.texts),
        num_tokens=reader.num_tokens,
        finish_reason=reader.finish_reason,
        piece_times_s=tuple(times),
        end_s=time.monotonic(),
    )
