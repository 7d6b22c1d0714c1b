"""How an endpoint's objects stand in a stream of server-sent events. Knows no endpoint.

Source: WHATWG HTML, "Server-sent events"; the streams of OpenAI's and of Anthropic's references.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

KEEPALIVE = b": keep-alive\n\n"  # a comment, which no client is told


class Framing(NamedTuple):
    """named: an event has the name that is its object's `type`. end: follows the last object.
    silence: is sent while there is nothing to say.
    """

    named: bool = False
    end: bytes = b""
    silence: bytes = KEEPALIVE

    def event(self, data: Mapping[str, Any]) -> bytes:
        return self.line(str(data["type"]) if self.named else "", msgspec.json.encode(data))

    def line(self, name: str, data: bytes) -> bytes:
        """One event, of an object that is JSON already."""
        if self.named:
            return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
        return b"data: " + data + b"\n\n"

    def events(self, objects: Iterable[Mapping[str, Any]]) -> bytes:
        return b"".join(map(self.event, objects))


CHUNKS = Framing(end=b"data: [DONE]\n\n")  # of OpenAI's completions
