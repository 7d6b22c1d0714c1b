"""docs/refused_fields.md has every field that a form refuses, and the endpoints do what it says."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from enginehouse.server.wire.refused_fields import INSTEAD, instead_of
from enginehouse.server.wire.shapes import Shape
from makers.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "refused_fields.py"))
REFUSED = SCRIPT["all_refused"]()
TURNS = {"messages": [{"role": "user", "content": "hello"}]}
MODEL = {"model": "tiny/chat"}
# What each endpoint answers, to which a field is added.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**MODEL, **TURNS},
    "/v1/completions": {**MODEL, "prompt": "hello"},
    "/v1/embeddings": {**MODEL, "input": "hello"},
    "/v1/responses": {**MODEL, "input": "hello"},
    "/v1/messages": {**MODEL, **TURNS, "max_tokens": 9},
    "/v1/messages/count_tokens": {**MODEL, **TURNS},
    "/tokenize": TURNS,
    "/apply-template": TURNS,
}
OUTER: dict[str, dict[str, Any]] = {"structured_outputs": {"json_object": True}}
# A value that asks for something, where it has to be well formed to be refused by its name.
ASKED: dict[str, Any] = {
    "best_of": 2,
    "max_tokens": 5,
    "n": 2,
    "prompt_logprobs": 1,
    "response_format": {"type": "json_object"},
}


def with_field(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A body with a value at `messages[].audio`: in the first item of the list."""
    made = copy.deepcopy({**{key: OUTER[key] for key in OUTER if path.startswith(key)}, **body})
    place: Any = made
    *outer, name = path.split(".")
    for key in outer:
        place = place[key.removesuffix("[]")]
        place = place[0] if key.endswith("[]") else place
    place[name] = value
    return made


@pytest.mark.parametrize("endpoint", sorted({refused.endpoint for refused in REFUSED}))
def test_an_endpoint_refuses_what_the_page_says_and_no_more(
    http: FlaskClient, endpoint: str
) -> None:
    assert endpoint in BODIES, f"give this test a body of {endpoint}"
    for _, path, passes in (refused for refused in REFUSED if refused.endpoint == endpoint):
        name = path.rpartition(".")[2]
        asked = with_field(BODIES[endpoint], path, ASKED.get(name, {"asks": "for it"}))
        response = http.post(endpoint, json=asked)
        assert response.status_code == 400, (path, response.json)
        error, param = response.json["error"], path.replace("[]", "[0]")
        assert error["message"].startswith(f"{param}: is not "), error
        assert error["message"].endswith(f"; {instead_of(name)}"), error
        assert error.get("code") in ("unsupported_parameter", None), error  # Anthropic's have none
        for value in (None, *passes):
            response = http.post(endpoint, json=with_field(BODIES[endpoint], path, value))
            assert response.status_code == 200, (path, value, response.json)
            assert "X-Ignored-Fields" not in response.headers, (path, value)


def forms(form: type[Shape] = Shape) -> Iterator[type[Shape]]:
    yield form
    for inner in form.__subclasses__():
        yield from forms(inner)


def test_every_form_that_refuses_is_of_an_endpoint() -> None:
    named = {name for form in forms() for name in (*form.refused, *form.foreign)}
    assert named == {refused.name for refused in REFUSED}


def test_every_refused_field_has_words_and_no_other_has() -> None:
    assert INSTEAD.keys() == {refused.name for refused in REFUSED}


def test_the_page_has_the_table_of_the_forms() -> None:
    page = SCRIPT["PAGE"].read_text(encoding="utf-8")
    assert SCRIPT["filled"](page) == page, "run python scripts/refused_fields.py"
