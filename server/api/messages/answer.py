"""Parts of an answer -> Anthropic's message of content blocks, and the events that tell it.

What is told whole is what the events add up to: both are made here, once. Knows no HTTP.
Source: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

from typing import Any

import msgspec

from enginehouse.server.answer.assembled import AssembledCompletion
from enginehouse.server.answer.completion import Delta
from enginehouse.server.answer.framing import Framing
from enginehouse.server.api.messages.errors import anthropic_error
from enginehouse.server.text.answer import Content, Part, Reasoning, ToolArguments, ToolCallStart
from enginehouse.server.wire.ids import Json

_PING = {"type": "ping"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageAnswer(AssembledCompletion):
    """max_tokens: what was asked for; where a limit came sooner, it was the context's end."""

    id_prefix = "msg_"
    framing = Framing(named=True, silence=b'event: ping\ndata: {"type":"ping"}\n\n')

    def __init__(self, *given: Any, max_tokens: int | None = None, **more: Any) -> None:
        super().__init__(*given, **more)
        self._max_tokens = max_tokens
        self._blocks: list[Json] = []
        self._open: Json | None = None  # the block that grows
        self._arguments = ""  # of the call that grows

    def whole(self) -> Json:
        self._close()
        return {**self._message(self._blocks), **self._ending(), "usage": self._usage()}

    def opening(self) -> list[Json]:
        started = {**self._message([]), "usage": {**self._usage(), "output_tokens": 0}}
        return [{"type": "message_start", "message": started}, _PING]

    def closing(self) -> list[Json]:
        self._close()
        usage = self._usage()
        told = {name: usage[name] for name in usage if name not in _OF_THE_MESSAGE}
        last = {"type": "message_delta", "delta": self._ending(), "usage": told}
        return [*self.events, last, {"type": "message_stop"}]

    def failing(self, error: dict[str, Any]) -> list[Json]:
        return [*self.events, anthropic_error(error["error"])]

    def take(self, delta: Delta) -> None:
        for part in delta.parts:
            self._grow(part)

    def _grow(self, part: Part) -> None:
        if isinstance(part, ToolCallStart):
            self._close()
            self._begin(
                {
                    "type": "tool_use",
                    "id": "toolu_" + part.id.removeprefix("call_"),
                    "name": part.name,
                    "input": {},
                    "caller": {"type": "direct"},
                }
            )
            self._arguments = ""
        elif isinstance(part, ToolArguments):
            self._arguments += part.text
            self._say({"type": "input_json_delta", "partial_json": part.text})
        elif isinstance(part, Reasoning):
            self._speak("thinking", {"thinking": "", "signature": ""}, part.text)
        elif isinstance(part, Content):
            self._speak("text", {"text": "", "citations": None}, part.text)

    def _speak(self, kind: str, empty: Json, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            self._close()
            self._begin({"type": kind, **empty})
        assert self._open is not None
        self._open[kind] += text
        self._say({"type": f"{kind}_delta", kind: text})

    def _begin(self, block: Json) -> None:
        self._blocks.append(block)
        self._open = block
        index = len(self._blocks) - 1
        start = {"type": "content_block_start", "index": index, "content_block": dict(block)}
        self.events.append(start)

    def _close(self) -> None:
        """The block that grows is whole, or is cut: the input of a call that was cut is empty."""
        block, self._open = self._open, None
        if block is None:
            return
        if block["type"] == "thinking":
            self._say({"type": "signature_delta", "signature": ""})
        if block["type"] == "tool_use":
            try:
                block["input"] = msgspec.json.decode(self._arguments or "{}")
            except msgspec.MsgspecError:
                block["input"] = {}
        self.events.append({"type": "content_block_stop", "index": len(self._blocks) - 1})

    def _say(self, delta: Json) -> None:
        index = len(self._blocks) - 1
        self.events.append({"type": "content_block_delta", "index": index, "delta": delta})

    def _message(self, blocks: list[Json]) -> Json:
        return {
            "id": self.completion_id,
            "type": "message",
            "role": "assistant",
            "model": self.terms.model,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
        }

    def _ending(self) -> Json:
        [choice] = self.choices
        reason = _STOP_REASONS[choice.finish_reason or "stop"]
        stop = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        if stop is not None:
            reason = "stop_sequence"
        elif reason == "max_tokens" and choice.num_tokens < (self._max_tokens or 0):
            reason = "model_context_window_exceeded"
        told = {"stop_reason": reason, "stop_sequence": stop}
        return {**told, "stop_details": None, "container": None}

    def _usage(self) -> Json:
        """A cached prefix is not among input_tokens, as Anthropic counts."""
        num_cached, num_thought = self.num_cached_tokens, self.num_reasoning_tokens
        return {
            "input_tokens": self.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "cache_creation": None,
            "output_tokens": self.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": num_thought},
            "server_tool_use": None,
            "service_tier": "standard",
            "inference_geo": None,
            "estimated_cost": self.cost,
        }


_OF_THE_MESSAGE = ("cache_creation", "service_tier", "inference_geo")
