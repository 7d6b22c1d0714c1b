"""Which web pages may ask, on every kind of answer, and what a browser is told before it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import make_key
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import HELLO, PATHS
from makers.token_outputs import tokens

PAGE = "https://chat.example.com"
KEY = {"Authorization": "Bearer first"}
ASKED = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type,x-stainless-os",
}
Served = Callable[..., FlaskClient]


@pytest.fixture
def served(settings: ServerSettings, engine: ScriptedClient) -> Served:
    """A server with a key, for pages of these origins."""

    def make(*origins: str) -> FlaskClient:
        given = dataclasses.replace(settings, api_keys=(make_key("first"),), cors_origins=origins)
        return create_app(given, engine).test_client()

    return make


def cors_of(response: TestResponse) -> dict[str, str]:
    return {k: v for k, v in response.headers if k.startswith("Access-Control-")}


ANSWERS: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/v1/models", {"headers": KEY}, 200),
    ("GET", "/health", {}, 200),
    ("GET", "/docs", {}, 200),
    ("HEAD", "/openapi.json", {}, 200),
    ("POST", PATHS[1], {"headers": KEY, "json": HELLO}, 200),
    ("POST", PATHS[0], {"headers": KEY, "json": {**HELLO, "stream": True}}, 200),
    ("POST", PATHS[0], {"headers": KEY, "json": {**HELLO, "temperature": 9}}, 400),
    ("POST", PATHS[0], {"json": HELLO}, 401),
    ("GET", "/nowhere", {"headers": KEY}, 404),
    ("GET", PATHS[0], {"headers": KEY}, 405),
    ("POST", PATHS[0], {"headers": KEY, "json": {**HELLO, "user": "u" * 100_000}}, 413),
    ("POST", PATHS[0], {"headers": KEY, "data": "{}"}, 415),
]


@pytest.mark.parametrize(("method", "path", "asked", "status"), ANSWERS)
def test_a_page_that_is_named_may_read_every_answer_and_no_other_may(
    served: Served, method: str, path: str, asked: dict[str, Any], status: int
) -> None:
    def ask(http: FlaskClient, origin: str | None) -> TestResponse:
        headers = {**asked.get("headers", {}), **({"Origin": origin} if origin else {})}
        with http.open(path, method=method, **{**asked, "headers": headers}) as response:
            assert response.status_code == status
            return response

    named = served("http://localhost:3000", PAGE)
    told = ask(named, PAGE)
    shown = cors_of(told).pop("Access-Control-Expose-Headers")
    wanted = {"X-Request-Id", "X-Ignored-Fields", "Retry-After", "x-ratelimit-limit-requests"}
    assert wanted | {"Server-Timing", "openai-processing-ms"} <= set(shown.split(", "))
    assert told.headers["Timing-Allow-Origin"] == PAGE
    assert cors_of(told) == {
        "Access-Control-Allow-Origin": PAGE,
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": shown,
    }
    for origin in ("https://chat.example.com.evil", "http://chat.example.com", "null", "*", None):
        other = ask(named, origin)
        assert cors_of(other) == {} and "Origin" in other.vary
    assert "Origin" in told.vary
    everyone = cors_of(ask(served("*"), "https://anyone.example"))
    assert everyone == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": shown,
    }
    off = ask(served(), PAGE)
    assert (
        cors_of(off) == {} and "Timing-Allow-Origin" not in off.headers and "Origin" not in off.vary
    )


def test_an_engine_that_is_gone_and_one_that_fails_are_read_too(
    served: Served, engine: ScriptedClient
) -> None:
    http = served(PAGE)
    engine.script = [*tokens("a"), ZeroDivisionError("a bug")]
    for ready, status in ((True, 500), (False, 503)):
        engine.ready = ready
        response = http.post(PATHS[0], json=HELLO, headers={**KEY, "Origin": PAGE})
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == PAGE


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/tokenize", "/nowhere", "/metrics"])
@pytest.mark.parametrize(("origins", "allowed"), [((PAGE,), PAGE), (("*",), "*")])
def test_a_preflight_is_answered_without_a_key_on_every_path(
    served: Served, path: str, origins: tuple[str, ...], allowed: str
) -> None:
    response = served(*origins).options(path, headers={"Origin": PAGE, **ASKED})
    assert (response.status_code, response.data) == (204, b"")
    told = cors_of(response)
    assert told["Access-Control-Allow-Origin"] == allowed
    assert {"GET", "POST"} <= set(told["Access-Control-Allow-Methods"].split(", "))
    assert told["Access-Control-Allow-Headers"] == ASKED["Access-Control-Request-Headers"]
    assert int(told["Access-Control-Max-Age"]) > 0
    assert ("Access-Control-Allow-Credentials" in told) == (allowed == PAGE)
    assert response.headers["X-Request-Id"]


def test_a_preflight_of_another_page_and_one_with_odd_names_allow_nothing(served: Served) -> None:
    http = served(PAGE)
    other = http.options(PATHS[0], headers={"Origin": "https://evil.example", **ASKED})
    assert other.status_code == 200 and cors_of(other) == {}
    odd = {**ASKED, "Access-Control-Request-Headers": "a b; c"}
    told = cors_of(http.options(PATHS[0], headers={"Origin": PAGE, **odd}))
    assert "Access-Control-Allow-Headers" not in told
    plain = http.options("/v1/models", headers={"Origin": PAGE})  # no preflight: what it allows
    assert plain.status_code == 200 and "GET" in plain.headers["Allow"]
