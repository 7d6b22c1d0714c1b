"""Schemas made to cost: each is answered, in a time that is bounded, and asks nobody else."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import msgspec
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas import plain
from enginehouse.runtime.schemas.effort import TooMuch, limited
from enginehouse.runtime.schemas.judge import Unjudged, judge_of
from enginehouse.runtime.schemas.merged import _KNOWN
from enginehouse.runtime.schemas.plain import plain_schema
from enginehouse.runtime.schemas.values import key_of
from enginehouse.server.tools.unenforced import plain_of
from makers.fuzzing import NUMBERS, VALUES, tries

FOREVER = "^(a|a)*$"  # a search that backtracks takes 2**40 steps of this text
TEXT = "a" * 40 + "!"


def text(pattern: str, **bounds: int) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern, **bounds}


WIDE: list[Any] = [
    {"allOf": [{"anyOf": [text(f"a{j}b{i}") for j in range(200)]} for i in range(3)]},
    {"items": text("^" + "a?" * 60_000 + "$", minLength=3000)},
    {"enum": list(range(20_000)), "anyOf": [{"const": -i} for i in range(5000)]},
    {"properties": {f"p{i}": text(f"(?=.*a)(?=.*b{i}).{{1,9}}") for i in range(2000)}},
    {"oneOf": [{"oneOf": [{"enum": [[i, j]]} for i in range(128)]} for j in range(128)]},
]


@pytest.mark.parametrize("schema", WIDE, ids=range(len(WIDE)))
@pytest.mark.parametrize("strict", [False, True])
def test_what_multiplies_ends_with_its_time(schema: Any, strict: bool) -> None:
    with limited(0.2), pytest.raises(TooMuch, match="takes more than 5 s to be read"):
        plain_schema(schema, strict)


def test_the_time_of_several_schemas_is_one_and_none_is_remembered_as_too_large() -> None:
    schema = {"type": "string", "pattern": "^(ab?c)+x$", "minLength": 5}
    with limited(0):
        for _ in range(2):
            with pytest.raises(TooMuch):
                plain_of(schema, False)
    assert plain_of(schema, False).schema["type"] == "string"


def test_a_pattern_beside_an_enum_is_not_searched_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_JUDGED_S", 0.1)
    made = plain_schema({"enum": [TEXT, "b"], "pattern": FOREVER}, strict=False)
    assert (made.schema, made.left_out) == ({"enum": [TEXT, "b"]}, ("schema.enum",))
    with pytest.raises(SchemaError, match="stands beside what cannot be judged"):
        plain_schema({"const": {TEXT: 1}, "patternProperties": {FOREVER: {}}}, strict=True)


def test_a_part_with_a_draft_of_its_own_leaves_no_limit() -> None:
    """jsonschema goes on with that draft's keywords, which are not ours."""
    draft = "http://json-schema.org/draft-07/schema#"
    part = {"$schema": draft, "pattern": FOREVER}
    with pytest.raises(Unjudged):
        judge_of({"$schema": draft, "properties": {"a": part}}, 1.0)
    assert judge_of({"$schema": draft, "properties": {"$schema": {"type": "string"}}}, 1.0)
    made = plain_schema({"enum": [{"a": TEXT}], "properties": {"a": part}}, strict=False)
    assert made.left_out == ("schema.enum",)


def test_a_reference_to_elsewhere_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **named: asked.append(args))
    schema = {"enum": [{"a": 1}], "properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}}
    assert plain_schema(schema, strict=False).left_out == ("schema.enum",)
    with pytest.raises(SchemaError):
        plain_schema(schema, strict=True)
    assert asked == []


def test_long_enums_share_what_is_equal_as_json() -> None:
    first = [*range(20_000), {"a": [1]}, True]
    second = [*range(19_999, 40_000), {"a": [1.0]}, 1.0]
    made = plain_schema({"allOf": [{"enum": first}, {"enum": second}]})
    assert made.schema == {"enum": [1, 19_999, {"a": [1]}]}
    assert key_of([True]) != key_of([1]) and key_of({"a": "1"}) != key_of({"a": 1})
    twice = [{"a": i} for i in range(5000)]
    made = plain_schema({"enum": [twice, [*twice, {"a": 7.0}]], "uniqueItems": True})
    assert made.schema == {"enum": [twice]}


@pytest.mark.parametrize("multiple", [[10**400], [2**53 - 1, 2**53 - 2], [10**200, 10**200 + 1]])
def test_multiples_beyond_all_numbers_are_told(multiple: list[int]) -> None:
    schema = {"type": "integer", "allOf": [{"multipleOf": each} for each in multiple]}
    assert plain_schema(schema, strict=False).left_out == ("schema.multipleOf",)
    with pytest.raises(SchemaError, match="multipleOf"):
        plain_schema(schema, strict=True)


def test_a_lookahead_too_large_for_an_automaton_is_left_out_beside_lengths() -> None:
    schema = {"type": "string", "pattern": "(?=.*x)[a-z]{1,700}", "minLength": 5}
    made = plain_schema(schema, strict=False)
    assert made.left_out == ("schema.pattern",)
    assert made.schema["pattern"].endswith("{5,})$")


REFERENCES = [
    "#",
    "#/$defs/a",
    "#/$defs/b",
    "#/properties/a",
    "#x",
    "http://127.0.0.1:9/x",
    "#/%zz",
]
PIECES = ["a", "b", "(", ")", "|", "*", "+", "?", "{2,5}", "{0,300}", "[", "]", "^", "$", "\\", "."]
PIECES += ["(?=", "(?!", "(?:", "\\d", "\\w", "[^a]", "\\1", "é", "\\u{1F600}", "-"]
PATTERNS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
NAMES = st.sampled_from(["a", "b", "", "é"])
OF_SCHEMAS = {"properties", "$defs", "dependentSchemas", "dependencies"}
OF_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
WORDS = sorted(_KNOWN | OF_SCHEMAS | {"$anchor", "$id", "$schema", "nullable"})


@st.composite
def nodes(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> Any:
    """Mostly what each keyword wants, sometimes anything."""
    node: dict[str, Any] = {}
    for word in draw(st.lists(st.sampled_from(WORDS), max_size=4)):
        if draw(st.integers(0, 12)) == 0:
            node[word] = draw(VALUES)
        elif word in OF_SCHEMAS:
            node[word] = draw(st.dictionaries(NAMES, inner, max_size=3))
        elif word == "patternProperties":
            node[word] = draw(st.dictionaries(PATTERNS, inner, max_size=2))
        elif word in OF_LISTS:
            node[word] = draw(st.lists(inner, min_size=1, max_size=3))
        elif word.endswith(("Ref", "$ref")):
            node[word] = draw(st.sampled_from(REFERENCES))
        elif word.startswith(("min", "max", "exclusive", "multiple")):
            node[word] = draw(NUMBERS | st.integers(0, 40))
        elif word == "pattern":
            node[word] = draw(PATTERNS)
        elif word == "format":
            node[word] = draw(st.sampled_from(["date", "email", "uuid", "ipv6", "time", "x"]))
        elif word == "type":
            kinds = ["string", "number", "integer", "object", "array", "null", "boolean"]
            node[word] = draw(st.sampled_from([*kinds, ["string", "null"]]))
        elif word in ("enum", "required"):
            node[word] = draw(st.lists(NAMES | NUMBERS, min_size=1, max_size=4))
        else:
            node[word] = draw(inner)
    return node


SCHEMAS = st.recursive(st.booleans() | st.just({"type": "string"}), nodes, max_leaves=10)


@tries(400)
@given(nodes(SCHEMAS), st.booleans())
def test_any_schema_is_made_plain_or_refused_in_a_sentence(schema: Any, strict: bool) -> None:
    try:
        sent = msgspec.json.decode(json.dumps(schema, ensure_ascii=False).encode())
    except (UnicodeEncodeError, msgspec.DecodeError):
        reject()  # half surrogates, NaN: no body holds them
    try:
        with limited(2):
            plain_of(sent, strict)
    except SchemaError as error:
        assert str(error)
