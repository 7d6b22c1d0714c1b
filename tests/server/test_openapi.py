"""The document tells the truth: of the routes, of what is taken, and of what is answered."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import schemathesis
from flask.testing import FlaskClient
from hypothesis import given
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from doubles.scripted_client import ScriptedClient
from enginehouse.server import openapi
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire import answers, bodies
from makers.api_client import PATHS, data_of
from makers.fuzzing import tries
from makers.text_engine import engine_info
from makers.token_outputs import STOP, bytes_ids, scored

MODEL = {"model": "tiny/chat"}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def scores(engine: ScriptedClient) -> None:
    engine.script = [scored([i]) for i in bytes_ids("a🙂")] + [scored([], STOP)]


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        (
            PATHS[0],
            {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1},
            answers.ChatCompletion,
            answers.ChatChunk,
        ),
        (
            "/v1/completions",
            {"prompt": ["hello", "dog"], "logprobs": 2},
            answers.TextCompletion,
            answers.TextChunk,
        ),
        (
            "/v1/completions",
            {"prompt": [5, 6, 7], "logprobs": 2, "echo": True, "prompt_logprobs": 1},
            answers.TextCompletion,
            answers.TextChunk,
        ),
    ],
)
def test_completions_are_what_the_document_says(
    http: FlaskClient,
    path: str,
    body: dict[str, Any],
    whole: type[BaseModel],
    chunk: type[BaseModel],
) -> None:
    whole.model_validate(http.post(path, json={**MODEL, **body}).json)
    options = {"stream": True, "stream_options": {"include_usage": True}, "prompt_logprobs": 0}
    with http.post(path, json={**MODEL, **body, **options}) as response:
        *chunks, done = data_of([response.data])
    assert done == "[DONE]" and len(chunks) > 3
    for item in chunks:
        chunk.model_validate(item)


def test_every_route_is_in_the_document_and_nothing_else(http: FlaskClient) -> None:
    document = http.get("/openapi.json").json
    told = {
        (path, method.upper()) for path, methods in document["paths"].items() for method in methods
    }
    routes = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule.replace("<path:name>", "{id}")), method)
        for rule in http.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    page = ("/v1/openai/chat/completions", "POST")  # the product page's name for the first
    ways_in = {(path, "GET") for path in ("/", "/page/{name}", "/openapi.json", "/docs")}
    not_there = {("/v1/responses/compact", "POST")}  # else it were the id of a response
    assert told == routes - ways_in - not_there | {page}


def test_the_document_is_made_of_the_models_that_validate(http: FlaskClient) -> None:
    schemas = http.get("/openapi.json").json["components"]["schemas"]
    for model in (bodies.ChatBody, bodies.CompletionBody, bodies.Message):
        wanted = {info.alias or name for name, info in model.model_fields.items()}
        assert set(schemas[model.__name__]["properties"]) == wanted
    top_p = schemas["ChatBody"]["properties"]["top_p"]["anyOf"]
    assert top_p == [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}]


def test_every_reference_in_the_document_leads_somewhere(http: FlaskClient) -> None:
    document = http.get("/openapi.json").json
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= document["components"]["schemas"].keys()


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        if tag == "a":
            self.links.add(given["href"] or "")
        if "id" in given:
            self.ids.add(given["id"] or "")


def test_the_page_loads_nothing_and_its_links_lead_somewhere(http: FlaskClient) -> None:
    page = Links()
    text = http.get("/docs").text
    page.feed(text)
    assert text.count("for example <code>{") >= 4, "what a request may send"
    assert page.loads == []
    assert {link.removeprefix("#") for link in page.links} <= page.ids | {"openapi.json"}
    assert "ChatBody" in page.ids


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


FUZZED = [  # what has no fields has nothing that could be wrong
    (operation, mode)
    for operation in openapi.OPERATIONS
    for mode in GenerationMode
    if operation.bodies or mode is GenerationMode.POSITIVE
]


@pytest.mark.parametrize(
    ("operation", "mode"), FUZZED, ids=[f"{mode.value} {item.path}" for item, mode in FUZZED]
)
def test_what_the_document_allows_and_what_it_forbids_is_answered_as_it_says(
    settings: ServerSettings, operation: openapi.Operation, mode: GenerationMode
) -> None:
    """Requests made from the document, legal ones and broken ones, by schemathesis."""
    engine = ScriptedClient(engine_info(), [scored([i]) for i in bytes_ids("abc")])
    engine.script += [(index, scored([], STOP)[1]) for index in range(20)]
    document = schemathesis.openapi.from_wsgi("/openapi.json", create_app(settings, engine))
    wanted = document[operation.path][operation.method]

    @tries(8)
    @given(case=wanted.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "tiny/chat"  # else nearly all end in a 404
            case.call_and_validate(checks=CHECKS)
        elif mode is GenerationMode.NEGATIVE:
            assert 400 <= response.status_code < 500, case.as_curl_command()

    ask()


def test_a_generated_client_may_send_every_default_and_every_example(http: FlaskClient) -> None:
    document = http.get("/openapi.json").json
    ids = [
        item["operationId"] for methods in document["paths"].values() for item in methods.values()
    ]
    assert len(set(ids)) == len(ids) and document["servers"]
    for name, schema in document["components"]["schemas"].items():
        for field, form in schema.get("properties", {}).items():
            if "default" in form:
                resolver = {**form, "$defs": document["components"]["schemas"]}
                text = json.dumps(resolver).replace("#/components/schemas/", "#/$defs/")
                errors = list(Draft202012Validator(json.loads(text)).iter_errors(form["default"]))
                assert errors == [], f"{name}.{field}"
    examples = {
        path: methods["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, methods in document["paths"].items()
        if "example" in str(methods.get("post", {}).get("requestBody"))
    }
    assert len(examples) == 9
    for path, example in examples.items():
        sent = {**example, **({"model": "tiny/chat"} if "model" in example else {})}
        assert http.post(path, json=sent).status_code == 200, path
