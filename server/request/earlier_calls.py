"""A call of a tool that the assistant made in an earlier turn, as a client tells it.

Knows no endpoint: each has the same name and JSON text in a place of its own.
"""

from __future__ import annotations

import msgspec

from enginehouse.server.text.message import ToolCall
from enginehouse.server.tools.json_reader import to_json


def call_made(call_id: str, name: str, given: object, path: str, repaired: list[str]) -> ToolCall:
    """given: its arguments, at `path`. Those that are no object stay as text where a template shows
    text; where it wants an object it is empty, and the field is named as repaired.
    """
    if isinstance(given, dict):
        return ToolCall(call_id, name, given)
    if isinstance(given, str) and given.strip() in ("", "null"):
        return ToolCall(call_id, name, {})
    text = given if isinstance(given, str) else to_json(given)
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return ToolCall(call_id, name, arguments)
    repaired.append(path)
    return ToolCall(call_id, name, {}, text)
