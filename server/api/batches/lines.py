"""Lines of a batch's input file -> requests, or what is wrong with each; answers -> output lines.

Knows no HTTP, and of a request no more than that it must not be a stream.
Source: OpenAI's guide "Batch API", "The request input object" and "The request output object".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import GIVES_WAY
from enginehouse.server.api.batches.body import BatchLine
from enginehouse.server.wire.ids import Json, new_id
from enginehouse.server.wire.refusal import parse_body, refuse

MAX_LINE_BYTES = 16 * 1024 * 1024


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
        if shape.body.get("stream"):
            refuse("body.stream", "found true; wanted no stream")
        return Line(number, custom_id, _giving_way(shape.body), None)
    except RequestError as error:
        return Line(number, custom_id, {}, error)


def _giving_way(body: Json) -> Json:
    """Lines with a priority of their own keep their order among themselves."""
    own = body.get("priority")
    rank = own if type(own) is int else 0
    return {**body, "priority": GIVES_WAY + max(0, min(rank, GIVES_WAY - 1))}


def output_line(line: Line, status: int, request_id: str, body: Json) -> Json:
    response = {"status_code": status, "request_id": request_id, "body": body}
    made = {"id": new_id("batch_req"), "custom_id": line.custom_id, "response": response}
    return {**made, "error": None}


def error_line(number: int, custom_id: str | None, code: str, message: str) -> Json:
    """Of a line that was not sent."""
    error = {"code": code, "message": message, "line": number}
    made = {"id": new_id("batch_req"), "custom_id": custom_id, "response": None}
    return {**made, "error": error}
