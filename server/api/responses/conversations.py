"""/v1/conversations: items that are kept under one id, for responses to go on with.

Source: OpenAI's API reference, "Conversations".
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from flask import Flask, Response
from pydantic import Field

from enginehouse.server.api.responses.body import WANTED, Items, Metadata
from enginehouse.server.api.responses.kept_items import found, kept_item, looked_up
from enginehouse.server.api.responses.store import Kept, Store
from enginehouse.server.http.kept import list_of, listed, not_found, owner
from enginehouse.server.http.service import Service, tell
from enginehouse.server.request.asked import ignored_fields
from enginehouse.server.wire.ids import Json, new_id
from enginehouse.server.wire.refusal import parse_body
from enginehouse.server.wire.responses import json_response
from enginehouse.server.wire.shapes import Body

MAX_ITEMS = 20  # at once, as OpenAI has it


class ConversationBody(Body):
    """POST /v1/conversations"""

    advice = {}
    wanted = WANTED

    items: Annotated[Items, Field(max_length=MAX_ITEMS)] = []
    metadata: Metadata = {}


class MetadataBody(Body):
    """POST /v1/conversations/{id}"""

    advice = {}
    wanted = WANTED

    metadata: Metadata


class ItemsBody(Body):
    """POST /v1/conversations/{id}/items"""

    wanted = WANTED

    items: Annotated[Items, Field(min_length=1, max_length=MAX_ITEMS)]


def add_conversations(app: Flask, service: Service, store: Store) -> None:
    def read(model: type[Body]) -> Any:
        return service.read(lambda body: parse_body(model, body, lambda data: None))

    @app.post("/v1/conversations")
    def create_conversation() -> Response:
        body, now = read(ConversationBody), time.time()
        made = {
            "id": new_id("conv"),
            "object": "conversation",
            "created_at": int(now),
            "metadata": body.metadata,
        }
        items = [kept_item(item) for item in looked_up(store, body.items, "items")]
        store.put(owner(), made, items, now)
        return tell(json_response(made), ignored_fields(body))

    @app.get("/v1/conversations/<conversation_id>")
    def get_conversation(conversation_id: str) -> Response:
        return json_response(found(store, conversation_id, "conversation").data)

    @app.post("/v1/conversations/<conversation_id>")
    def update_conversation(conversation_id: str) -> Response:
        body, kept = read(MetadataBody), found(store, conversation_id, "conversation")
        made = {**kept.data, "metadata": body.metadata}
        store.put(owner(), made, kept.items, time.time())
        return tell(json_response(made), ignored_fields(body))

    @app.delete("/v1/conversations/<conversation_id>")
    def delete_conversation(conversation_id: str) -> Response:
        found(store, conversation_id, "conversation")
        store.drop(owner(), conversation_id)
        gone = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
        return json_response(gone)

    @app.get("/v1/conversations/<conversation_id>/items")
    def list_items(conversation_id: str) -> Response:
        return json_response(listed(found(store, conversation_id, "conversation").items))

    @app.post("/v1/conversations/<conversation_id>/items")
    def add_items(conversation_id: str) -> Response:
        body = read(ItemsBody)
        items = looked_up(store, body.items, "items")
        added = [kept_item(item) for item in items]
        found(store, conversation_id, "conversation")
        store.append(owner(), conversation_id, added, time.time())
        return tell(json_response(list_of(added)), ignored_fields(body))

    @app.get("/v1/conversations/<conversation_id>/items/<item_id>")
    def get_item(conversation_id: str, item_id: str) -> Response:
        return json_response(_item(found(store, conversation_id, "conversation"), item_id))

    @app.delete("/v1/conversations/<conversation_id>/items/<item_id>")
    def delete_item(conversation_id: str, item_id: str) -> Response:
        kept = found(store, conversation_id, "conversation")
        gone = _item(kept, item_id)
        store.put(owner(), kept.data, [item for item in kept.items if item != gone], time.time())
        return json_response(kept.data)


def _item(kept: Kept, item_id: str) -> Json:
    item = next((each for each in kept.items if each["id"] == item_id), None)
    if item is None:
        not_found("item_id", "item", item_id)
    return item
