"""Items as they are kept: each with an id, its texts named by who said them.

Source: OpenAI's API reference, "List input items".
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from enginehouse.server.api.responses.body import Item
from enginehouse.server.api.responses.store import Kept, Store
from enginehouse.server.http.kept import not_found, owner
from enginehouse.server.wire.ids import Json, new_id
from enginehouse.server.wire.refusal import refuse

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


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


def found(store: Store, kept_id: str, kind: str, param: str = "id") -> Kept:
    """A `response` or a `conversation`; 404 where there is none of that id."""
    kept = store.get(owner(), kept_id, time.time())
    if kept is None or kept.data["object"] != kind:
        not_found(param, kind, kept_id)
    return kept


def looked_up(store: Store, items: Sequence[Item], param: str) -> list[Item]:
    """The items, each that is a reference as what it names. param: of the body."""
    whole = []
    for index, item in enumerate(items):
        if item.type == "item_reference":
            place = f"{param}[{index}].id"
            if not item.id:
                words = "missing; wanted the id of an item that is kept"
                refuse(place, words, "missing_required_parameter")
            kept = store.find_item(owner(), item.id, time.time())
            if kept is None:
                not_found(place, "item", item.id)
            [item] = read_kept([kept])
        whole.append(item)
    return whole
