"""POST /v1/chat/completions: body, conversation, answer."""

from __future__ import annotations

import time

from flask import Response

from enginehouse.server.api.chat.answer import ChatCompletion
from enginehouse.server.api.chat.request import parse_chat_request
from enginehouse.server.http.conversations import converse
from enginehouse.server.http.service import Service


def chat_completions(service: Service) -> Response:
    started_s = time.monotonic()
    max_messages = service.max_messages
    asked = service.read(lambda body: parse_chat_request(body, max_messages))
    return converse(service, asked, ChatCompletion, started_s)
