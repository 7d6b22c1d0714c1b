"""Every name of a grammar becomes one runtime value, and two of them a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.request import ConstraintKind, FinishReason, Refusal, TokenOutput
from enginehouse.server.api.chat.request import parse_chat_request
from enginehouse.server.request.constraints import read_constraint
from enginehouse.server.wire.bodies import CompletionBody
from makers.api_client import ask, data_of, error_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TAG = {"begin": "<f>", "schema": SCHEMA, "end": "</f>"}
LEGACY = {"structures": [TAG], "triggers": ["<f"]}
FORMAT = {"format": {"type": "regex", "pattern": "a+"}}
Kind = ConstraintKind
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

LEGAL: list[tuple[dict[str, Any], Kind, Any, str]] = [  # fields, kind, value, param
    ({"response_format": {"type": "json_object"}}, Kind.JSON_OBJECT, "", "response_format"),
    (
        {"response_format": NAMED},
        Kind.JSON_SCHEMA,
        SCHEMA,
        "response_format.json_schema.schema",
    ),
    ({"guided_json": SCHEMA}, Kind.JSON_SCHEMA, SCHEMA, "guided_json"),
    ({"guided_json": json.dumps(SCHEMA)}, Kind.JSON_SCHEMA, SCHEMA, "guided_json"),
    ({"guided_regex": "[ab]+"}, Kind.REGEX, "[ab]+", "guided_regex"),
    ({"guided_grammar": 'root ::= "a"'}, Kind.EBNF, 'root ::= "a"', "guided_grammar"),
    ({"guided_choice": ["a", "é"]}, Kind.CHOICE, ["a", "é"], "guided_choice"),
    ({"structured_outputs": {"json": SCHEMA}}, Kind.JSON_SCHEMA, SCHEMA, "structured_outputs.json"),
    (
        {"structured_outputs": {"json_object": True}},
        Kind.JSON_OBJECT,
        "",
        "structured_outputs.json_object",
    ),
    ({"structured_outputs": {"regex": "a"}}, Kind.REGEX, "a", "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a"]}}, Kind.CHOICE, ["a"], "structured_outputs.choice"),
    (
        {"structured_outputs": {"grammar": 'root ::= "a"'}},
        Kind.EBNF,
        'root ::= "a"',
        "structured_outputs.grammar",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "value", "param"), LEGAL, ids=str)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_name_reaches_the_engine_as_one_value(
    http: FlaskClient,
    engine: ScriptedClient,
    path: str,
    fields: dict[str, Any],
    kind: Kind,
    value: Any,
    param: str,
) -> None:
    prompt = {"prompt": "hello"} if path == "/v1/completions" else {}
    messages = {} if prompt else {"messages": [{"role": "user", "content": "hello"}]}
    body = {"model": "tiny/chat", **prompt, **messages, **fields}
    data = json.dumps(body)  # Flask's own client would sort the keys
    response = http.post(path, data=data, content_type="application/json")
    assert response.status_code == 200
    [(_, [sampling])] = engine.submitted
    constraint = sampling.constraint
    assert constraint is not None and (constraint.kind, constraint.param) == (kind, param)
    if isinstance(value, str):
        assert constraint.value == value
    else:
        assert json.loads(constraint.value) == value
        if isinstance(value, dict):  # the order of properties is the order of the answer
            assert list(json.loads(constraint.value)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag", **FORMAT}}, "response_format"),
        ({"response_format": {"type": "structural_tag", **LEGACY}}, "response_format"),
        (
            {"structured_outputs": {"structural_tag": json.dumps(LEGACY)}},
            "structured_outputs.structural_tag",
        ),
        ({"structured_outputs": {"structural_tag": FORMAT}}, "structured_outputs.structural_tag"),
    ],
)
def test_structural_tags_are_what_xgrammar_reads_in_either_form(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], param: str
) -> None:
    assert ask(http, **fields).status_code == 200
    [(_, [sampling])] = engine.submitted
    constraint = sampling.constraint
    assert constraint is not None
    assert (constraint.kind, constraint.param) == (Kind.STRUCTURAL_TAG, param)
    read = xgrammar.StructuralTag.from_json(constraint.value)
    if "structures" in json.dumps(fields):
        item = xgrammar.StructuralTagItem(begin="<f>", schema=SCHEMA, end="</f>")
        assert read == xgrammar.StructuralTag.from_legacy_structural_tag([item], ["<f"])
    else:
        assert read.format.model_dump(include={"type", "pattern"}) == FORMAT["format"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": NAMED, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided_choice"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": "["}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    (
        {"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}},
        "structured_outputs.whitespace_pattern",
    ),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag.structures",
    ),
    (
        {"structured_outputs": {"structural_tag": {"structures": 5}}},
        "structured_outputs.structural_tag.structures",
    ),
    ({"guided_json": "5"}, "guided_json"),
    ({"guided_json": ""}, "guided_json"),
    ({"guided_json": "[" * 90_000}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_object", "json_schema": NAMED["json_schema"]}},
        "response_format.json_schema",
    ),
    ({"response_format": {"type": "text", **FORMAT}}, "response_format.format"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.structures"),
    (
        {"response_format": {"type": "structural_tag", "structures": [TAG]}},
        "response_format.triggers",
    ),
    ({"response_format": {"type": "structural_tag", **FORMAT, **LEGACY}}, "response_format.format"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_half_a_grammar_and_two_grammars_are_refused(
    http: FlaskClient, engine: ScriptedClient, fields: dict[str, Any], param: str
) -> None:
    response = ask(http, **fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert engine.submitted == []


@pytest.mark.parametrize("value", [{"a": "x" * 262_144}, "x" * 262_145])
@pytest.mark.parametrize("field", ["guided_json", "guided_regex", "guided_grammar"])
def test_a_grammar_has_a_greatest_size(field: str, value: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], field: value}
    with pytest.raises(RequestError) as caught:
        parse_chat_request(json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, field)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


def test_a_schema_nested_too_deeply_never_reaches_the_engine(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    assert ask(http, guided_json=deep(20)).status_code == 200
    for fields in (
        {"guided_json": deep(100)},
        {"response_format": {**NAMED, "json_schema": {"name": "x", "schema": deep(100)}}},
        {"metadata": deep(100)},
        {"chat_template_kwargs": deep(100)},
    ):
        response = ask(http, **fields)
        assert response.status_code == 400
        assert "nested too deeply" in error_of(response)["message"]
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_the_engine_refuses_is_a_400_also_of_a_stream(
    http: FlaskClient, engine: ScriptedClient, stream: bool
) -> None:
    refusal = Refusal("guided_regex: no regex; wanted one", "guided_regex", "invalid_grammar")
    engine.script = [(0, TokenOutput(1, [], FinishReason.ERROR, refusal=refusal))]
    response = ask(http, guided_regex="(", stream=stream)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "guided_regex")
    assert (error["code"], error["type"]) == ("invalid_grammar", "invalid_request_error")


def test_a_refusal_after_the_stream_has_begun_is_an_event(
    http: FlaskClient, engine: ScriptedClient
) -> None:
    refusal = Refusal("guided_regex: too slow", "guided_regex", "invalid_grammar")
    engine.script = [None, (0, TokenOutput(1, [], FinishReason.ERROR, refusal=refusal))]
    with ask(http, guided_regex="(", stream=True) as response:
        *_, error, done = data_of([response.data])
    assert (response.status_code, done) == (200, "[DONE]")
    assert error["error"]["param"] == "guided_regex"


def test_an_object_cut_by_the_limit_says_length(http: FlaskClient, engine: ScriptedClient) -> None:
    engine.script = [(0, TokenOutput(1, [90], FinishReason.LENGTH))]
    [choice] = ask(http, response_format={"type": "json_object"}).json["choices"]
    assert choice["finish_reason"] == "length"


def test_other_servers_names_are_the_same_constraint() -> None:
    def read(**fields: Any) -> Any:
        bound = read_constraint(CompletionBody(model="m", prompt="p", **fields))
        assert bound is not None
        return bound.constraint

    def same(one: Any, other: Any) -> bool:
        return (one.kind, one.value) == (other.kind, other.value)

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert same(read(regex="a+"), read(guided_regex="a+"))
    assert same(read(ebnf='root ::= "a"'), read(guided_grammar='root ::= "a"'))
    bound = read(response_format={"type": "json_object", "schema": schema})
    assert same(bound, read(guided_json=schema)) and bound.param == "response_format.schema"
    with pytest.raises(RequestError, match="ebnf: contradicts regex"):
        read(regex="a", ebnf="b")
