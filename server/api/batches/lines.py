"""Lines of a batch's input file -> requests, or what is wrong with each; answers -> output lines.

Knows no HTTP, and of a request no more than that it must not be a stream.
Source: OpenAI's guide "Batch API", "The request input object" and "The request output object".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import GIVES_WAY
from enginehouse.server.api.batches.body import BatchLine
from enginehouse.server.wire.ids import Json, new_id
from enginehouse.server.wire.refusal import parse_body, refuse

MAX_LINE_BYTES = 16 * 1024 * 1024
_MOST_ID = 512
_USUAL = GIVES_WAY // 2  # the rank of a line without a priority, among those that give way


class Line(NamedTuple):
    """number: of the line in its file, from 1. error: what is wrong with it, else None. body: with
    the priority that gives way to all that is asked directly.
    """

    number: int
    custom_id: str | None
    body: Json
    error: RequestError | None


def read_lines(path: Path, endpoint: str) -> Iterator[Line]:
    """Every line but those that are empty; each error is its own line's."""
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            yield _line(number, text, endpoint, seen)


def _line(number: int, text: bytes, endpoint: str, seen: dict[str, int]) -> Line:
    custom_id = None
    try:
        if len(text) > MAX_LINE_BYTES:
            refuse("line", f"it has {len(text)} bytes; wanted at most {MAX_LINE_BYTES}")
        shape = parse_body(BatchLine, text, lambda data: None)
        custom_id = shape.custom_id
        if custom_id in seen:
            first = seen[custom_id]
            refuse("custom_id", f'"{custom_id[:60]}" is that of line {first} too', "duplicate")
        seen[custom_id] = number
        if shape.url.rstrip("/") != endpoint:
            refuse("url", f'found "{shape.url[:60]}"; wanted the batch\'s endpoint, "{endpoint}"')
        for name in ("stream", "background"):
            if shape.body.get(name):
                refuse(
                    f"body.{name}", "found true; wanted the answer whole, in the batch's own file"
                )
        return Line(number, custom_id, _giving_way(shape.body), None)
    except RequestError as error:
        return Line(number, _custom_id(text), {}, error)


def _custom_id(text: bytes) -> str | None:
    """Of a line that may be none: whoever sent it knows it again by that."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None
    own = found.get("custom_id") if isinstance(found, dict) else None
    return own[:_MOST_ID] if isinstance(own, str) else None


def _giving_way(body: Json) -> Json:
    """Lines with a priority of their own keep their order among themselves. One that is none is
    their endpoint's to refuse.
    """
    own = body.get("priority")
    if own is not None and (type(own) is not int or not -(2**31) <= own < 2**31):
        return body
    return {**body, "priority": GIVES_WAY + _USUAL + max(-_USUAL, min(own or 0, _USUAL - 1))}


def output_line(line: Line, status: int, request_id: str, body: Json) -> Json:
    response = {"status_code": status, "request_id": request_id, "body": body}
    made = {"id": new_id("batch_req"), "custom_id": line.custom_id, "response": response}
    return {**made, "error": None}


def error_line(number: int, custom_id: str | None, code: str, message: str) -> Json:
    """Of a line that was not sent."""
    error = {"code": code, "message": message, "line": number}
    made = {"id": new_id("batch_req"), "custom_id": custom_id, "response": None}
    return {**made, "error": error}
