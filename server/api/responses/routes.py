"""POST /v1/responses, and what is asked of those that are kept. Read this page first.

    body, items that came before -> what is asked -> the way of every conversation -> response

Knows Flask's request; not what an item means, nor how an answer is generated.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from functools import partial
from typing import cast

import gevent
from flask import Flask, Response, g
from werkzeug.exceptions import NotFound

from enginehouse.server.api.responses.answer import ResponseAnswer
from enginehouse.server.api.responses.background import run_apart
from enginehouse.server.api.responses.body import ResponsesBody
from enginehouse.server.api.responses.conversations import add_conversations
from enginehouse.server.api.responses.kept_items import found, kept_item, looked_up, read_kept
from enginehouse.server.api.responses.request import (
    OWN_NAMES,
    ResponsesRequest,
    parse_responses_body,
    responses_request,
)
from enginehouse.server.api.responses.store import Kept, Store
from enginehouse.server.http.conversations import begin, converse, tell_of
from enginehouse.server.http.kept import listed, owner, query
from enginehouse.server.http.processes import own_mark, runs
from enginehouse.server.http.service import Service
from enginehouse.server.request.own_names import own_names
from enginehouse.server.wire.ids import Json
from enginehouse.server.wire.refusal import refuse
from enginehouse.server.wire.responses import json_response

LOG = logging.getLogger("enginehouse.server")
_CANCEL_WAIT_S = 5.0
_RUNNING = ("queued", "in_progress")


def add_responses(app: Flask, service: Service) -> None:
    settings = service.settings
    store = Store(
        settings.responses_path or ":memory:",
        settings.responses_max_bytes,
        settings.responses_ttl_s,
    )
    add_conversations(app, service, store)

    @app.post("/v1/responses")
    def create() -> Response:
        return create_response(service, store)

    @app.post("/v1/responses/compact")
    def compact() -> Response:
        raise NotFound("conversations are not compacted here")

    @app.get("/v1/responses/<response_id>")
    def get(response_id: str) -> Response:
        if query("stream") == "true":
            refuse("stream", "a kept response is not streamed; wanted no stream")
        return json_response(_found(store, response_id).data)

    @app.delete("/v1/responses/<response_id>")
    def delete(response_id: str) -> Response:
        _found(store, response_id)
        store.drop(owner(), response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.get("/v1/responses/<response_id>/input_items")
    def input_items(response_id: str) -> Response:
        return json_response(listed(_found(store, response_id).items))

    @app.post("/v1/responses/<response_id>/cancel")
    def cancel(response_id: str) -> Response:
        return json_response(_cancelled(store, response_id))


def create_response(service: Service, store: Store) -> Response:
    started_s = time.monotonic()
    max_items = service.max_messages
    body = service.read(lambda data: parse_responses_body(data, max_items))
    with own_names(OWN_NAMES):
        own = looked_up(store, body.input, "input")
        body = body.model_copy(update={"input": own})
        past = _past_of(store, body)
        asked = service.beside(lambda: responses_request(body, read_kept(past)))
        items = [kept_item(item) for item in own]
        keep = partial(_keep, store, owner(), body, items)
        form = partial(ResponseAnswer, body, keep=keep)
        if body.background:
            return _in_background(service, store, asked, items, form, started_s)
        return converse(service, asked, form, started_s)


def _in_background(
    service: Service,
    store: Store,
    asked: ResponsesRequest,
    items: list[Json],
    form: partial[ResponseAnswer],
    started_s: float,
) -> Response:
    """Answered at once. With a worker ends what it works on: that has failed then."""
    begun = begin(service, asked, form, started_s)
    answer = cast(ResponseAnswer, begun.completion)
    mine, response_id = owner(), answer.completion_id
    store.put(mine, answer.response, items, time.time(), own_mark())
    response = json_response({**answer.response, "status": "queued"})
    wants_cancel = partial(store.wants_cancel, mine, response_id)
    ticket = g.pop("ticket", None)  # what it takes of a key's limits, it takes until its end
    apart = service, answer, begun.generation, str(g.request_id), wants_cancel, ticket
    gevent.spawn(run_apart, *apart)
    return tell_of(service, begun.asked, response)


def _keep(store: Store, mine: str, body: ResponsesBody, items: list[Json], response: Json) -> None:
    """An answer is worth more than its being kept: a full disk is logged."""
    now = time.time()
    try:
        was_deleted = body.background and store.get(mine, response["id"], now) is None
        if body.store and not was_deleted:
            store.put(mine, response, items, now)
        if body.conversation is not None and response["status"] != "failed":
            store.append(mine, body.conversation.id, [*items, *response["output"]], now)
    except sqlite3.Error as error:
        LOG.warning("response %s is not kept: %s", response["id"], error)


def _past_of(store: Store, body: ResponsesBody) -> list[Json]:
    """The items of the conversation that the body goes on with. What is used is not yet old."""
    if body.conversation is not None:
        items = found(store, body.conversation.id, "conversation", "conversation").items
        store.renew(owner(), [body.conversation.id], time.time())
        return items
    turns: list[list[Json]] = []
    chain: list[str] = []
    wanted = body.previous_response_id
    while wanted is not None:
        kept = store.get(owner(), wanted, time.time())
        if kept is None or kept.data["object"] != "response":
            after = f', which "{chain[-1][:100]}" goes on with' if chain else ""
            refuse(
                "previous_response_id",
                f'no response "{wanted[:100]}" is kept{after}; send the whole conversation',
                "previous_response_not_found",
            )
        if kept.data["status"] in _RUNNING:
            words = f'"{wanted[:100]}" is still {kept.data["status"]}; wanted one that has ended'
            refuse("previous_response_id", words)
        chain.append(wanted)
        turns.append([*kept.items, *kept.data["output"]])
        wanted = kept.data["previous_response_id"]
    store.renew(owner(), chain, time.time())
    return [item for turn in reversed(turns) for item in turn]


def _found(store: Store, response_id: str) -> Kept:
    """404 where it is not kept. One whose worker has ended has failed."""
    kept = found(store, response_id, "response")
    if kept.data["status"] in _RUNNING and not (kept.worker and runs(kept.worker)):
        words = "the worker that made it has ended; send the request again"
        error = {"code": "server_error", "message": words}
        failed = {**kept.data, "status": "failed", "error": error}
        store.put(owner(), failed, kept.items, time.time())
        kept = kept._replace(data=failed)
    return kept


def _cancelled(store: Store, response_id: str) -> Json:
    kept = _found(store, response_id)
    if not kept.data["background"]:
        refuse("id", "it is not of the background; close the connection of the request instead")
    store.ask_to_cancel(owner(), response_id)
    deadline_s = time.monotonic() + _CANCEL_WAIT_S
    while kept.data["status"] in _RUNNING and time.monotonic() < deadline_s:
        gevent.sleep(0.05)
        kept = _found(store, response_id)
    return kept.data
