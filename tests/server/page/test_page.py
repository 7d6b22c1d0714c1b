"""What `GET /` gives to browsers and to others, and the files of the page."""

from __future__ import annotations

import dataclasses
import gzip
import re

import pytest
from flask.testing import FlaskClient

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.page.fields import MAIN
from enginehouse.server.page.files import STATIC
from enginehouse.server.settings import ServerSettings
from enginehouse.server.wire.bodies import ChatBody

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
NAMES = sorted(path.name for path in STATIC.iterdir() if path.name != "index.html")


def test_a_browser_gets_the_page_under_a_strict_policy(http: FlaskClient) -> None:
    response = http.get("/", headers=BROWSER)
    assert (response.status_code, response.mimetype) == (200, "text/html")
    assert {"Accept", "Accept-Encoding"} <= set(response.vary)
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/json", "text/html;q=0.1, application/json", "text/plain"]
)
def test_who_names_no_html_is_told_where_everything_is(
    http: FlaskClient, accept: str | None
) -> None:
    response = http.get("/", headers={} if accept is None else {"Accept": accept})
    assert response.json["openapi"] == "/openapi.json"
    assert "Accept" in response.vary


@pytest.mark.parametrize("name", [*NAMES, "fields.json"])
def test_a_file_is_zipped_once_and_not_sent_again(http: FlaskClient, name: str) -> None:
    plain = http.get(f"/page/{name}")
    zipped = http.get(f"/page/{name}", headers={"Accept-Encoding": "br, gzip"})
    assert plain.status_code == zipped.status_code == 200
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.data) == plain.data
    assert plain.headers["ETag"] != zipped.headers["ETag"]
    assert plain.mimetype == zipped.mimetype != "application/octet-stream"
    tag = {"Accept-Encoding": "gzip", "If-None-Match": zipped.headers["ETag"]}
    again = http.get(f"/page/{name}", headers=tag)
    assert (again.status_code, again.data) == (304, b"")
    head = http.head(f"/page/{name}")
    assert (head.data, head.headers["Content-Length"]) == (b"", str(len(plain.data)))


def test_the_page_loads_nothing_of_others_and_has_no_script_of_its_own(http: FlaskClient) -> None:
    text = http.get("/", headers=BROWSER).text
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text)
    for name in NAMES:
        code = http.get(f"/page/{name}").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", code)
        found = set(re.findall(r"https?://[\w./-]+", text + code))
        assert found <= {"http://www.w3.org/2000/svg"}, name
    for name in re.findall(r'(?:href|src)="page/([^"]+)"', text):
        assert name in NAMES


def test_every_file_that_a_module_imports_is_there() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert name in NAMES, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2froutes.py", ""])
def test_what_is_no_file_of_the_page_is_a_404(http: FlaskClient, name: str) -> None:
    response = http.get(f"/page/{name}")
    assert response.status_code == 404 and "error" in response.json


def test_turned_off_it_is_as_if_there_were_none(
    settings: ServerSettings, engine: ScriptedClient
) -> None:
    http = create_app(dataclasses.replace(settings, page=False), engine).test_client()
    assert http.get("/", headers=BROWSER).json["api"] == "/v1"
    assert http.get("/page/icon.svg").status_code == 404


def test_the_form_has_every_sampling_field_with_what_validates_it(http: FlaskClient) -> None:
    fields = {field["name"]: field for field in http.get("/page/fields.json").json}
    assert set(MAIN) <= fields.keys() <= ChatBody.model_fields.keys()
    assert all(field["about"].strip() for field in fields.values())
    top_p, seed = fields["top_p"], fields["seed"]
    assert (top_p["exclusiveMinimum"], top_p["maximum"], top_p["default"]) == (0, 1, 1.0)
    assert (seed["kind"], seed["minimum"], seed["default"]) == ("integer", 0, None)
    assert (fields["stop"]["kind"], fields["stop"]["most"]) == ("list", 16)
    assert fields["reasoning_effort"]["enum"][0] == "none"
