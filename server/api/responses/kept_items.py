"""Items as they are kept and listed: each with an id, its texts named by who said them.

Knows no store and no HTTP. Source: OpenAI's API reference, "List input items".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from enginehouse.server.api.responses.body import Item
from enginehouse.server.api.responses.resource import Json, new_id
from enginehouse.server.wire.refusal import refuse

MAX_LISTED = 100
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


class Page(NamedTuple):
    """Which part of a list is asked for."""

    limit: int = 20
    after: str | None = None
    ascending: bool = False


def kept_item(item: Item) -> Json:
    said = "output_text" if item.role == "assistant" else "input_text"
    told = item.model_dump(exclude_unset=True, exclude_none=True, by_alias=True)
    for name in ("content", "output"):
        for part in told.get(name, ()):
            if part["type"] == "text":
                part["type"] = said
            if part["type"] == "output_text":
                part.setdefault("annotations", [])
    told["id"] = item.id or new_id(_PREFIXES[item.type])
    if item.type in ("message", "function_call", "function_call_output"):
        told.setdefault("status", "completed")
    return told


def read_kept(items: Sequence[Json]) -> list[Item]:
    return [Item.model_validate(item) for item in items]


def listed(items: Sequence[Json], page: Page) -> Json:
    """One page of them, as OpenAI tells lists."""
    ordered = list(items if page.ascending else reversed(items))
    if page.after is not None:
        ids = [item["id"] for item in ordered]
        if page.after not in ids:
            refuse("after", f'"{page.after[:100]}" is none of the items; wanted the id of one')
        ordered = ordered[ids.index(page.after) + 1 :]
    told = ordered[: page.limit]
    return {
        "object": "list",
        "data": told,
        "first_id": told[0]["id"] if told else None,
        "last_id": told[-1]["id"] if told else None,
        "has_more": len(ordered) > len(told),
    }


def read_page(limit: str | None, order: str | None, after: str | None) -> Page:
    """Of a query string; RequestError where it is none."""
    if limit is not None and not re.fullmatch("[1-9][0-9]?|100", limit):
        refuse("limit", f'found "{limit[:60]}"; wanted 1 <= limit <= {MAX_LISTED}')
    if order not in (None, "asc", "desc"):
        refuse("order", f'found "{str(order)[:60]}"; wanted "asc" or "desc"')
    return Page(20 if limit is None else int(limit), after, order == "asc")
