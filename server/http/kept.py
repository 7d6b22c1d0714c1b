"""What is asked of kept things: whose they are, one page of a list, and that one is not there.

Knows Flask's request; not what is kept. Source: OpenAI's API reference, "List input items".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import parse_qs

from flask import request

from enginehouse.runtime.errors import RequestError
from enginehouse.server.wire.refusal import refuse
from enginehouse.server.wire.responses import KEY_NAME

_LISTED = 20  # where nobody says how many


def owner() -> str:
    """Whose the request is: what one key keeps, no other finds."""
    return str(request.environ.get(KEY_NAME, ""))


def query(name: str) -> str | None:
    """Of the request's query string, whatever its bytes are."""
    given = parse_qs(request.query_string.decode(errors="replace"), keep_blank_values=True)
    return given.get(name, [None])[-1]


def listed(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The page that the query string asks for, of items from the oldest on."""
    limit, order, after = query("limit"), query("order"), query("after")
    if limit is not None and not re.fullmatch("[1-9][0-9]?|100", limit):
        refuse("limit", f'found "{limit[:60]}"; wanted 1 <= limit <= 100')
    if order not in (None, "asc", "desc"):
        refuse("order", f'found "{str(order)[:60]}"; wanted "asc" or "desc"')
    ordered = list(items if order == "asc" else reversed(items))
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            refuse("after", f'"{after[:100]}" is none of the items; wanted the id of one')
        ordered = ordered[ids.index(after) + 1 :]
    told = ordered[: _LISTED if limit is None else int(limit)]
    return list_of(told, has_more=len(ordered) > len(told))


def list_of(items: Sequence[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def not_found(param: str, kind: str, wanted: str) -> NoReturn:
    """What is not there, or is another key's."""
    raise RequestError(
        f'{param}: no {kind} "{wanted[:100]}" is kept here',
        param=param,
        code=f"{kind}_not_found",
        status=404,
    )
