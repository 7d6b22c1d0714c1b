"""POST /v1/messages and /v1/messages/count_tokens: body, conversation, answer. Read this first."""

from __future__ import annotations

import time
from functools import partial

from flask import Flask, Response

from enginehouse.server.api.messages.answer import MessageAnswer
from enginehouse.server.api.messages.request import (
    OWN_NAMES,
    parse_count_request,
    parse_messages_request,
)
from enginehouse.server.http.conversations import converse, tell_of
from enginehouse.server.http.service import Service
from enginehouse.server.request.own_names import own_names
from enginehouse.server.wire.responses import json_response

_ANY_LENGTH = 2**31  # tokens: what is too long for the context is counted too
PREFIX = "/v1/messages"  # below it, errors have Anthropic's shape


def add_messages(app: Flask, service: Service) -> None:
    @app.post(PREFIX)
    def create_message() -> Response:
        started_s, max_messages = time.monotonic(), service.max_messages
        with own_names(OWN_NAMES):
            asked = service.read(lambda body: parse_messages_request(body, max_messages))
            form = partial(MessageAnswer, max_tokens=asked.max_tokens)
            return converse(service, asked, form, started_s)

    @app.post(f"{PREFIX}/count_tokens")
    def count_tokens() -> Response:
        max_messages = service.max_messages
        with own_names(OWN_NAMES):
            asked = service.read(lambda body: parse_count_request(body, max_messages))
            service.check_model(asked.fields.model, param="model")
            service.check_ready()
            prompt = service.chat.prompt(asked.messages, _ANY_LENGTH, asked.options)
        return tell_of(service, asked, json_response({"input_tokens": len(prompt.ids)}))
