"""Parts of an answer -> output items and the events that tell them, each with its number.

What is told whole is what the events add up to: both are made here, once. Knows no HTTP.
Source: OpenAI's API reference, "Streaming events"; the Open Responses specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from enginehouse.server.answer.assembled import AssembledCompletion
from enginehouse.server.answer.completion import Delta
from enginehouse.server.answer.framing import Framing
from enginehouse.server.api.responses.body import ResponsesBody
from enginehouse.server.api.responses.resource import (
    call_item,
    head_of,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
    usage_of,
)
from enginehouse.server.text.answer import Content, Part, Reasoning, ToolCallStart
from enginehouse.server.text.logprobs import TokenEntry, chat_logprobs
from enginehouse.server.wire.ids import Json

_ENDINGS = {"length": ("incomplete", {"reason": "max_output_tokens"})}
_OPEN, _COMPLETED, _INCOMPLETE = "in_progress", "completed", "incomplete"


class ResponseAnswer(AssembledCompletion):
    """body: what was asked, of which the response tells again. keep: is given the response object
    once it has ended, however that is.
    """

    id_prefix = "resp_"
    framing = Framing(named=True, end=b"data: [DONE]\n\n")

    def __init__(
        self,
        body: ResponsesBody,
        *given: Any,
        keep: Callable[[Json], None] = lambda response: None,
        **more: Any,
    ) -> None:
        super().__init__(*given, **more)
        self.response = head_of(body, self.completion_id, self.created, self.terms.model)
        self._keep = keep
        self._tools = {tool.full_name: tool for tool in body.tools}
        self._items: list[Json] = self.response["output"]
        self._open: Json | None = None  # the item that grows
        self._num_events = 0
        self._untold: list[TokenEntry] = []

    def whole(self) -> Json:
        self._end()
        return self.response

    def opening(self) -> list[Json]:
        first = [self._event(f"response.{name}", response=self._snapshot()) for name in _FIRST]
        return self._numbered(first)

    def told(self, delta: Delta) -> list[Json]:
        return self._numbered(super().told(delta))

    def closing(self) -> list[Json]:
        self._end()
        last = self._event(f"response.{self.response['status']}", response=self.response)
        return self._numbered([*self.events, last])

    def failing(self, error: dict[str, Any]) -> list[Json]:
        """The error as OpenAI's clients read it, and the response that has failed."""
        told = error["error"]
        self.fail(str(told["code"] or "server_error"), str(told["message"]))
        flat = {name: told[name] for name in ("code", "message", "param")}
        error_event = self._event("error", error=told, **flat)
        failed = self._event("response.failed", response=self.response)
        return self._numbered([*self.events, error_event, failed])

    def fail(self, code: str, message: str, status: str = "failed") -> None:
        """It ends here, with what there is."""
        self._close(_INCOMPLETE)
        self.response |= {"status": status, "usage": usage_of(self)}
        if status == "failed":
            self.response["error"] = {"code": code, "message": message}
        self._keep(self.response)

    def take(self, delta: Delta) -> None:
        self._untold += delta.entries
        if delta.parts and not any(isinstance(part, Content) for part in delta.parts):
            self._untold = []  # of a thought or a call, whose log probabilities have no place
        for part in delta.parts:
            self._grow(part)

    def _grow(self, part: Part) -> None:
        if isinstance(part, ToolCallStart):
            self._close(_COMPLETED)
            tool = self._tools[part.name]
            self._begin(call_item(part.id, tool.name, tool.namespace, _OPEN))
            return
        if isinstance(part, (Content, Reasoning)):
            kind = "message" if isinstance(part, Content) else "reasoning"
            if self._open is None or self._open["type"] != kind:
                self._close(_COMPLETED)
                self._begin_text(kind)
            assert self._open is not None
            inner = self._open["content"][0]
            inner["text"] += part.text
            self._say(f"{_TEXT_EVENTS[kind]}.delta", delta=part.text, **self._logprobs(inner))
            return
        assert self._open is not None, "arguments follow their call"
        self._open["arguments"] += part.text
        self._say("response.function_call_arguments.delta", delta=part.text)

    def _begin(self, item: Json) -> None:
        self._items.append(item)
        self._open = item
        index = len(self._items) - 1
        self.events.append(
            self._event("response.output_item.added", output_index=index, item=_copy(item))
        )

    def _begin_text(self, kind: str) -> None:
        self._begin(message_item(_OPEN) if kind == "message" else reasoning_item(_OPEN))
        assert self._open is not None
        part = text_part() if kind == "message" else reasoning_part()
        self._open["content"].append(part)
        self._say("response.content_part.added", part=_copy(part))

    def _close(self, status: str) -> None:
        """The item that grows is whole, or is cut."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            named = {"arguments": item["arguments"], "name": item["name"]}
            self._say("response.function_call_arguments.done", item, **named)
        else:
            part = item["content"][0]
            self._logprobs(part)
            known = {name: part[name] for name in ("text", "logprobs") if name in part}
            self._say(f"{_TEXT_EVENTS[item['type']]}.done", item, **known)
            self._say("response.content_part.done", item, part=part)
        index = len(self._items) - 1
        self.events.append(self._event("response.output_item.done", output_index=index, item=item))

    def _say(self, kind: str, item: Json | None = None, **more: Any) -> None:
        """An event of the last item, and of its one part where it has parts."""
        item = self._open if item is None else item
        assert item is not None
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        if item["type"] != "function_call":
            place["content_index"] = 0
        self.events.append(self._event(kind, **place, **more))

    def _logprobs(self, part: Json) -> Json:
        """Of what is said now; they wait while nothing is said."""
        if part["type"] != "output_text":
            return {}
        told: list[Json] = []
        if self.terms.num_logprobs is not None:
            entries, self._untold = self._untold, []
            told = [
                _with_bytes(each) for each in chat_logprobs(entries, self.terms.pieces)["content"]
            ]
            part["logprobs"] += told
        return {"logprobs": told}

    def _end(self) -> None:
        """Once, when all has been said."""
        if self.response["status"] != _OPEN:
            return
        [choice] = self.choices
        status, details = _ENDINGS.get(choice.finish_reason or "", (_COMPLETED, None))
        if not self._items:
            self._begin_text("message")
        self._close(status)
        self.response |= {"status": status, "incomplete_details": details, "usage": usage_of(self)}
        if status == _COMPLETED:
            self.response["completed_at"] = self.created + round(self._seconds())
        self._keep(self.response)

    def _seconds(self) -> float:
        return max(0.0, (self.finished_s or self.started_s) - self.started_s)

    def _snapshot(self) -> Json:
        return {**self.response, "output": []}

    def _event(self, kind: str, **more: Any) -> Json:
        return {"type": kind, "sequence_number": 0, **more}

    def _numbered(self, events: list[Json]) -> list[Json]:
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return events


_FIRST = ("created", _OPEN)
_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def _copy(item: Json) -> Json:
    """As it is now: its lists grow."""
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


def _with_bytes(entry: Json) -> Json:
    """A special token has no bytes, and OpenAI's schema wants a list."""
    told = {**entry, "bytes": entry["bytes"] or []}
    if "top_logprobs" in entry:
        told["top_logprobs"] = [_with_bytes(each) for each in entry["top_logprobs"]]
    return told
