"""A server of ours does all that is asked, and every field of a request is asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from doubles.broken_server import breaking
from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.behaviour.converse import ALONE, CASES, converse
from enginehouse.regress.behaviour.judging import Conversation, judge_behaviour
from enginehouse.regress.findings import Status
from enginehouse.regress.subject import api as routes
from enginehouse.server.client.connection import ServerUnreachable
from enginehouse.server.wire import bodies
from enginehouse.server.wire.shapes import SamplingFields, Shape
from makers.behaviour import Recorded, api_at
from makers.gunicorn_server import Server

TEXT_ROUTES = {routes.TOKENIZE, routes.DETOKENIZE, routes.TEMPLATE}


def test_our_own_server_passes_every_case(conversation: Conversation, recorded: Recorded) -> None:
    failed = {case.name: case.said for case in conversation.results if not case.passed}
    assert failed == {}
    names = [case.name for case in conversation.results]
    assert names == [*CASES, *ALONE], "told in their order, whichever ended first"
    assert sorted(recorded.ended) == sorted(names)
    assert [case.said for case in conversation.results if case.said] == []


def test_every_field_of_a_request_is_in_a_case(
    recorded: Recorded, conversation: Conversation
) -> None:
    asked: dict[str, set[str]] = {}
    for path, body in recorded.asked:
        asked.setdefault(path, set()).update(body)
    chat, text = asked[routes.CHAT], asked[routes.COMPLETIONS]
    assert names_of(SamplingFields) - (chat | text) == set()
    assert names_of(bodies.ChatBody) - names_of(SamplingFields) - chat == set()
    assert names_of(bodies.CompletionBody) - names_of(SamplingFields) - text == set()
    of_texts = {
        name
        for shape in (
            bodies.TokenizeBody,
            bodies.TokenizeChatBody,
            bodies.DetokenizeBody,
            bodies.TemplateBody,
        )
        for name in names_of(shape)
    }
    assert of_texts - set().union(*(asked[path] for path in TEXT_ROUTES)) == set()


def test_every_field_within_a_field_is_in_a_case(
    recorded: Recorded, conversation: Conversation
) -> None:
    asked = {key for _, body in recorded.asked for key in keys_within(list(body.values()))}
    for shape in shapes_below(Shape):
        # Other endpoints are translations into the same request.
        is_of_completions = shape.__module__.startswith("enginehouse.server.wire")
        if is_of_completions and not shape.__name__.endswith(("Body", "Fields")):
            assert names_of(shape) - asked == set(), shape.__name__


def names_of(shape: type[Shape]) -> set[str]:
    return {info.alias or name for name, info in shape.model_fields.items()}


def shapes_below(shape: type[Shape]) -> Iterator[type[Shape]]:
    for below in shape.__subclasses__():
        yield below
        yield from shapes_below(below)


def keys_within(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from keys_within(item)


@pytest.mark.parametrize("content", [b"<html>", b'{"detail": "Not Found"}', b"[1]"])
@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_that_answers_anything_else_is_a_result(status: int, content: bytes) -> None:
    with always(status, content) as url:
        found = converse(api_at(url), Known())
    asked = [case.name for case in found.results if case.passed and not case.said]
    assert asked == []
    judged = judge_behaviour(None, found, is_ours=False)
    assert {finding.status for finding in judged} == {Status.NOT_JUDGED}


@contextmanager
def always(status: int, content: bytes) -> Iterator[str]:
    """A server that names one model and answers everything else alike."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            is_list = self.path == "/v1/models"
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200 if is_list else status)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "a"}]}' if is_list else content)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_gone_ends_the_conversation(served: Server, known: Known) -> None:
    with breaking(served.url, "none") as url:
        api = api_at(url)
    with pytest.raises(ServerUnreachable):
        converse(api, known)
