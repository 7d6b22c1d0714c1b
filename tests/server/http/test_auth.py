"""Which keys open, what is open to all, and where keys come from."""

from __future__ import annotations

import dataclasses

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.api_keys import make_key
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.api_client import error_of


@pytest.fixture
def locked(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    keys = dataclasses.replace(settings, api_keys=(make_key("first"), make_key("zweiter-é")))
    return create_app(keys, engine).test_client()


@pytest.mark.parametrize("value", ["Bearer first", "bearer  first", "BEARER zweiter-é"])
def test_a_key_opens(locked: FlaskClient, value: str) -> None:
    header = value.encode().decode("latin-1")
    assert locked.get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Bearer firs", "Basic first"])
@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/tokenize", "/healthy"])
def test_no_key_is_a_401(locked: FlaskClient, path: str, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    error = error_of(response)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert value is None or value[7:] == "" or value[7:] not in error["message"]


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready", "/metrics"]
)
def test_probes_and_scrapers_need_no_key(locked: FlaskClient, path: str) -> None:
    assert locked.get(path).status_code == 200
    assert locked.options("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("open_pages", "closed"),
    [
        ((), ["/metrics", "/docs", "/openapi.json"]),
        (("docs",), ["/metrics"]),
        (("metrics",), ["/docs"]),
    ],
)
def test_what_is_told_without_a_key_is_a_setting(
    settings: ServerSettings, engine: ScriptedClient, open_pages: tuple[str, ...], closed: list[str]
) -> None:
    keys = dataclasses.replace(settings, api_keys=(make_key("first"),), open_pages=open_pages)
    http = create_app(keys, engine).test_client()
    for path in ["/metrics", "/docs", "/health/ready", "/health/live"]:
        assert (http.get(path).status_code == 401) == (path in closed), path
        assert http.get(path, headers={"X-Api-Key": "first"}).status_code == 200


@pytest.mark.parametrize(("key", "status"), [("first", 200), ("other", 401), ("", 401)])
def test_a_key_may_come_as_anthropics_clients_send_it(
    locked: FlaskClient, key: str, status: int
) -> None:
    assert locked.get("/v1/models", headers={"X-Api-Key": key}).status_code == status
