"""Every field of a completion request, from one table: bounds, types, null, and the document."""

from __future__ import annotations

import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.wire.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TemplateBody,
    TokenizeBody,
    TokenizeChatBody,
)
from enginehouse.server.wire.shapes import Shape
from makers.api_client import error_of
from makers.field_cases import ADVICE, CHAT, COMPLETIONS, HELLO, Field
from makers.paths import ROOT
from makers.token_outputs import STOP, bytes_ids, scored

ENDPOINTS: dict[str, tuple[type[Any], dict[str, Field], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatBody, CHAT, {"model": "tiny/chat", "messages": [HELLO]}),
    "/v1/completions": (CompletionBody, COMPLETIONS, {"model": "tiny/chat", "prompt": "hello"}),
}
OF_TOKENS = (TokenizeBody, TokenizeChatBody, DetokenizeBody, TemplateBody)
CASES = [(path, name) for path, (_, table, _) in ENDPOINTS.items() for name in table]


@pytest.fixture(autouse=True)
def answering(engine: ScriptedClient) -> None:
    engine.script = [
        (index, scored(ids, finish)[1])
        for index in range(20)
        for ids, finish in ((bytes_ids("b"), None), ([], STOP))
    ]


def post(http: FlaskClient, path: str, fields: dict[str, Any]) -> Any:
    return http.post(path, json={**ENDPOINTS[path][2], **fields})


@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_field_takes_what_is_legal_and_null(http: FlaskClient, path: str, name: str) -> None:
    field = ENDPOINTS[path][1][name]
    for value in [*field.legal, *([] if field.required else [None])]:
        with post(http, path, {**_needs(field, value), name: value}) as response:
            assert response.status_code == 200, (value, response.json)
            named = name if value in ADVICE.get(name, []) else None
            assert response.headers.get("X-Ignored-Fields") == named


@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_field_refuses_what_is_not_and_is_named(
    http: FlaskClient, engine: ScriptedClient, path: str, name: str
) -> None:
    field = ENDPOINTS[path][1][name]
    assert field.refused
    for value, param, code in field.refused:
        response = post(http, path, {**field.needs, name: value})
        error = error_of(response)
        found = (response.status_code, error["param"], error["code"])
        assert found == (400, param, code), (value, error)
        assert error["message"].startswith(param)
    assert engine.submitted == []


def _needs(field: Field, value: Any) -> dict[str, Any]:
    """null is absent, and false asks for nothing: then nothing else may hang on the field."""
    return {} if value is None or value is False else field.needs


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_of_the_body_has_its_row(path: str) -> None:
    body, table, _ = ENDPOINTS[path]
    assert names_of(body) == table.keys()


def names_of(*bodies: type[Shape]) -> set[str]:
    return {info.alias or name for body in bodies for name, info in body.model_fields.items()}


def rows_of(page: str, title: str) -> set[str]:
    """The names in the first column of the tables under a heading of a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    cells = re.findall(r"^\| ([^|]+) \|", section, re.M)
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


@pytest.mark.parametrize(
    ("page", "title", "wanted"),
    [
        ("sampling.md", "Fields", CHAT.keys() & COMPLETIONS.keys() - {"logprobs"}),
        ("chat.md", "Fields", CHAT.keys() - (COMPLETIONS.keys() - {"logprobs"})),
        ("completions.md", "Fields", COMPLETIONS.keys() - (CHAT.keys() - {"logprobs"})),
        ("tokens.md", "Fields", names_of(*OF_TOKENS)),
    ],
)
def test_the_page_has_every_field_and_no_other(page: str, title: str, wanted: set[str]) -> None:
    assert rows_of(page, title) == wanted
