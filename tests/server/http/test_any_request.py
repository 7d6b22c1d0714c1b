"""Any request at all, at every route of the application: never a 500, always the one shape."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder, run_wsgi_app

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import KeyLimits, make_key
from enginehouse.server.app import create_app
from enginehouse.server.http.metrics import CONTENT_TYPE
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire.error_body import make_error
from makers.field_cases import CHAT, COMPLETIONS
from makers.fuzzing import VALUES, changed, tries
from makers.text_engine import engine_info
from makers.token_outputs import STOP, bytes_ids, scored

HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "t"}]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
]
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 2, "n": 2},
        {"messages": TALK, "tools": [TOOL], "tool_choice": "required"},
        {"messages": HELLO, "response_format": FORM, "logit_bias": {"5": 1}, "stop": ["a", "b"]},
        {"messages": HELLO, "chat_template_kwargs": {"a": 1}, "metadata": {"a": "b"}},
    ],
    "/v1/completions": [
        {"prompt": ["hello", "dog"], "logprobs": 1, "echo": True, "best_of": 3},
        {"prompt": [[5, 6], [7]], "stream": True, "guided_json": SCHEMA, "seed": 1},
        {"prompt": "a", "guided_regex": "[ab]+", "stop_token_ids": [5]},
    ],
    "/tokenize": [{"prompt": "hello", "return_token_strs": True}, {"messages": TALK}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
    "/apply-template": [{"messages": TALK, "tools": [TOOL]}],
}
TYPES = (
    "application/json",
    "text/event-stream; charset=utf-8",
    "text/html; charset=utf-8",
    CONTENT_TYPE,
)
FIELDS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


def app_of(settings: ServerSettings) -> Flask:
    engine = ScriptedClient(engine_info(), [scored([i]) for i in bytes_ids("abc")])
    engine.script += [(index, scored([], STOP)[1]) for index in range(20)]
    return create_app(settings, engine)


@pytest.fixture(scope="module")
def app(settings: ServerSettings) -> Flask:
    return app_of(settings)


@pytest.fixture(scope="module")
def locked(settings: ServerSettings) -> Flask:
    """With keys and their limits, and a web page that may ask."""
    keys = (make_key("x", KeyLimits(rpm=1000, tpm=10**9, concurrent=3)),)
    return app_of(dataclasses.replace(settings, api_keys=keys, cors_origins=("http://a",)))


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    app: Flask,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    query: str = "",
) -> Answer:
    """As gunicorn hands a request over: what is no ASCII stands as Latin-1."""
    environ = EnvironBuilder(method="POST", data=body).get_environ()
    environ |= {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    for name, value in (headers or {}).items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_TYPE" else f"HTTP_{key}"] = value
    parts, status, found = run_wsgi_app(app.wsgi_app, environ, buffered=True)
    return Answer(int(status.split()[0]), dict(found), b"".join(parts))


def check(app: Flask, answer: Answer, asked: tuple[object, ...]) -> None:
    """No failure of the server; a refusal in OpenAI's shape, with a code; a content type that the
    document names. And the next request is answered.
    """
    status, headers, body = answer
    assert status < 500, (asked, body[:500])
    assert headers["X-Request-Id"], asked
    for name, value in headers.items():
        assert value.isprintable(), (asked, name, value)
    told = headers.get("Content-Type")
    assert told in TYPES or (status == 204 and told is None), (asked, told)
    if status >= 400:
        assert told == "application/json", asked
        if body or asked[0] != "HEAD":
            error = json.loads(body)["error"]
            if "request_id" in json.loads(body):  # Anthropic's shape, where that is asked for
                assert "messages" in str(asked[1]) and set(error) == {"message", "type"}, asked
                error |= {"param": None, "code": "none"}
            assert set(error) == {"message", "type", "param", "code"}, asked
            assert error["type"] and error["message"] and error["code"], (asked, error)
            assert len(error["message"]) <= 1000 and len(error["param"] or "") <= 200, asked
            assert error["message"].splitlines() == [error["message"]], (asked, error)
    good = ask(app, "GET", "/health/ready")
    assert good.status == 200


METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
LATIN = st.text(st.characters(max_codepoint=255), max_size=40)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["Accept", "Authorization", "Content-Encoding", "Content-Type", "Cookie", "Expect", "Host"]
        + ["If-None-Match", "Origin", "Access-Control-Request-Method", "Range", "Traceparent"]
        + ["Access-Control-Request-Headers", "Tracestate", "Transfer-Encoding", "Upgrade"]
        + ["X-Api-Key", "X-Forwarded-For", "X-Forwarded-Host", "X-Http-Method-Override"]
        + ["X-Request-Id"]
    ),
    st.one_of(
        LATIN,
        st.sampled_from(
            ["*/*", "application/json", "application/json; charset=utf-16", "gzip", "identity"]
            + ["Bearer x", "Basic !", "bytes=0-", "[", "a:b:c", "localhost:99999", "x" * 5000]
            + ["00-" + "0" * 32 + "-" + "f" * 16 + "-01", "multipart/form-data; boundary=x"]
        ),
    ),
    max_size=4,
)


def paths_of(app: Flask) -> list[str]:
    return sorted({rule.rule for rule in app.url_map.iter_rules()})


@st.composite
def paths(draw: st.DrawFn, rules: list[str]) -> str:
    """A route's path, its parameter filled, and sometimes changed a little."""
    path = draw(st.sampled_from(rules)).replace("<path:name>", draw(LATIN))
    match draw(st.integers(0, 7)):
        case 0:
            return path + draw(LATIN)
        case 1:
            return "/v1/openai" + path.removeprefix("/v1")
        case 2:
            return draw(st.sampled_from(["", "//", "*", "/../", "/%2e%2e/", "/v1/"])) + path
    return path


JSON_TYPE = {"Content-Type": "application/json"}


@pytest.mark.parametrize("kind", ["app", "locked"])
def test_anything_at_every_route(kind: str, request: pytest.FixtureRequest) -> None:
    app: Flask = request.getfixturevalue(kind)
    rules = paths_of(app)
    assert {*BODIES, "/v1/models/<path:name>"} < set(rules)

    @tries(250)
    @given(METHODS, paths(rules), LATIN, HEADERS, st.binary(max_size=50), st.booleans())
    def check_one(
        method: str, path: str, query: str, headers: dict[str, str], body: bytes, typed: bool
    ) -> None:
        asked = (method, path, query, headers, body)
        headers = {**headers, **JSON_TYPE} if typed else headers
        check(app, ask(app, method, path, body, headers, query), asked)

    check_one()


def with_fields(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A good body, changed in a few places, or with odd values of its known fields."""
    known = FIELDS.get(path, {})
    good = [{**body, "model": "tiny/chat"} for body in BODIES[path]]
    whole = st.sampled_from(good).flatmap(changed)
    if not known:
        return whole
    legal = st.sampled_from(sorted(known)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.one_of(st.sampled_from(known[name].legal).flatmap(near), VALUES),
        )
    )
    return st.one_of(
        whole,
        st.builds(
            lambda body, fields: {**body, **dict(fields)},
            st.sampled_from(good),
            st.lists(legal, max_size=3),
        ),
    )


def near(value: Any) -> st.SearchStrategy[Any]:
    """A legal value, or one that is nearly so."""
    if isinstance(value, (dict, list)):
        return st.one_of(st.just(value), changed(value))
    return st.one_of(st.just(value), VALUES)


@pytest.mark.parametrize("path", sorted(BODIES))
def test_any_json_at_every_route_that_takes_it(app: Flask, path: str) -> None:
    @tries(150)
    @given(with_fields(path))
    def check_one(body: dict[str, Any]) -> None:
        text = json.dumps(body, ensure_ascii=True)
        answer = ask(app, "POST", path, text.encode(), JSON_TYPE)
        check(app, answer, (path, text[:2000]))

    check_one()


@pytest.mark.parametrize(
    ("method", "path", "model"),
    [
        ("GET", "/a\nb\x1b[2J", "tiny/chat"),
        ("GET", "/v1/models/a\nb", "tiny/chat"),
        ("POST", "/tokenize", "a\nb"),
        ("POST", "/tokenize", "\u202e\u2028"),
        ("POST", "/tokenize", "x" * 50_000),
    ],
)
def test_a_refusal_is_one_line_whatever_it_quotes(
    app: Flask, method: str, path: str, model: str
) -> None:
    body = json.dumps({"model": model, "prompt": "a"}).encode()
    answer = ask(app, method, path, body, JSON_TYPE)
    check(app, answer, (method, path, model))
    assert answer.status == 404


def test_what_is_quoted_stands_as_it_can_be_read() -> None:
    error = make_error(400, "found a\nb\x1b\ud800\u202e", param="p" * 300).body["error"]
    assert error["message"] == r"found a\nb\x1b\ud800\u202e"
    long = make_error(400, "a" * 5000 + " leave it out").body["error"]["message"]
    assert long.startswith("aaa") and long.endswith(" leave it out") and len(long) <= 1000
    assert len(error["param"]) == 200
