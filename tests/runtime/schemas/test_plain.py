"""The schemas that zod, pydantic and others write are taken, and their grammars are true.

jsonschema is the oracle: what a grammar lets through is valid unless something of the schema is
named as left out, and what is invalid is not let through.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import xgrammar
from jsonschema.validators import Draft7Validator, Draft202012Validator, validator_for

from enginehouse.runtime.grammar.child import build_grammar
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import SchemaError, installed
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.runtime.schemas.plain import plain_schema
from makers.paths import DATA

TOKENS = [b""] + [bytes([byte]) for byte in range(1, 256)]
INFO = xgrammar.TokenizerInfo(TOKENS, xgrammar.VocabType.RAW, vocab_size=256, stop_token_ids=[0])
_NUM_WALKS, _MOST_WALKS, _LONGEST = 3, 12, 400


def written_by(name: str) -> dict[str, Any]:
    schemas: dict[str, Any] = json.loads(
        (DATA / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    )
    return schemas


WRITTEN = {
    (name, key): s
    for name in ("zod3", "zod4", "pydantic", "others")
    for key, s in written_by(name).items()
}


def compiled(schema: Any) -> xgrammar.CompiledGrammar:
    plain = plain_schema(schema, strict=False)
    checked = check(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(plain.schema)), installed())
    return build_grammar(INFO, checked.kind, checked.value).grammar


def oracle_of(schema: Any) -> Any:
    """OpenAPI's are of no draft that they name; with a list of items they are of an older one."""
    older = '"items": [' in json.dumps(schema)
    return validator_for(schema, Draft7Validator if older else Draft202012Validator)(schema)


def accepts(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def walk(grammar: xgrammar.CompiledGrammar, choose: random.Random) -> str | None:
    """A text of the grammar; None where it does not end in time. Late, it hurries to the end."""
    matcher = xgrammar.GrammarMatcher(grammar)
    bitmask = xgrammar.allocate_token_bitmask(1, 256)
    text = b""
    for step in range(_LONGEST):  # 0xED begins surrogates, which some of xgrammar's classes take
        matcher.fill_next_token_bitmask(bitmask)
        words = bitmask[0].tolist()
        allowed = [i for i in range(256) if words[i // 32] >> (i % 32) & 1]
        closing = b'"' if text.count(b'"') % 2 else b'}]"'
        hurried = [i for i in allowed if i == 0 or TOKENS[i] in closing] if step > 40 else []
        plain = [i for i in allowed if i < 0x80 or (step % 5 == 0 and i != 0xED)]
        if not allowed:
            return None
        token = choose.choice(hurried or plain or allowed)
        if token == 0:
            return text.decode()
        matcher.accept_token(token)
        text += TOKENS[token]
    return None


def changed(value: Any, choose: random.Random) -> Iterator[Any]:
    """Values near by: parts left out, added, of another type, longer."""
    yield from (None, 3.5, -7, "x", "y" * 300, [], {}, [value], {"a": value}, True)
    if isinstance(value, str):
        yield from (value[1:], value[:-1], value + "z", value * 2, "")
    if isinstance(value, list):
        yield from ([*value, *value], value[1:], [*value, "x", {}])
    if isinstance(value, dict):
        yield {**value, "unknown_name": 1}
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for other in list(changed(inner, choose))[:16]:
                yield {**value, key: other}


def test_there_are_as_many_as_were_asked_for() -> None:
    counts = {name: len(written_by(name)) for name in ("zod3", "zod4", "pydantic")}
    assert counts["zod3"] + counts["zod4"] >= 157 and counts["pydantic"] >= 66


@pytest.mark.parametrize("which", WRITTEN, ids="-".join)
def test_a_generators_schema_is_taken_and_its_grammar_is_true(
    which: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    schema = WRITTEN[which]
    left_out = plain_schema(schema, strict=False).left_out
    oracle = oracle_of(schema)
    grammar = compiled(schema)
    assert capfd.readouterr().err == "", "what xgrammar warns of is refused"
    choose = random.Random("/".join(which))
    walks = (walk(grammar, choose) for _ in range(_MOST_WALKS))
    texts = list(islice((text for text in walks if text is not None), _NUM_WALKS))
    assert texts or which in VALID, "no walk ended"
    for text in texts:
        value = json.loads(text)
        assert left_out or oracle.is_valid(value), (text, *oracle.iter_errors(value))
        for other in changed(value, choose):
            if not left_out and not oracle.is_valid(other):
                assert not accepts(grammar, written(other)), other


VALID = {
    ("zod4", "string_email"): ["ada@example.com", "a.b+c@mail.example.org"],
    ("zod4", "string_uuid"): ["5f0c3c3e-8a52-4b6e-9a3f-0d2a3f0b7c11"],
    ("zod4", "string_datetime"): ["2024-02-28T12:00:00Z", "2025-01-01T00:00:00.123Z"],
    ("zod4", "iso_date_new"): ["2024-02-28"],
    ("zod4", "ipv4_new"): ["192.168.0.1"],
    ("zod4", "nanoid_new"): ["V1StGXR8_Z5jdHi6B-myT"],
    ("zod4", "base64_new"): ["", "aGk=", "aGVsbG8h"],
    ("zod4", "string_regex_both"): ["abc", "user_name_20_letters"],
    ("zod4", "string_starts_ends"): ["az", "abcz"],
    ("zod4", "string_ends"): ["a.com", ".com"],
    ("zod4", "string_two_regexes"): ["a1", "a b 9"],
    ("zod3", "string_url_max"): ["https://example.com/a?b=c", "mailto:ada"],
    ("zod3", "record_enum"): [{}, {"a": 1, "b": 2.5}],
    ("zod4", "record_enum"): [{"a": 1, "b": 2.5}],
    ("zod3", "intersection"): [{"a": "x", "b": 1}],
    ("zod4", "intersection_three"): [{"a": "x", "b": 1, "c": False}],
    ("zod4", "never"): [{"a": "x"}],
    ("zod4", "number_positive"): [1, 0.5],
    ("zod4", "discriminated"): [{"kind": "dog", "name": "Rex"}],
    ("zod4", "multiple_of_step_new"): [0.25, 1],
    ("zod3", "tuple"): [["a", 1.5]],
    ("pydantic", "int64"): [0, -(2**53), 2**53],
    ("pydantic", "int_multiple_range"): [0, 95],
    ("pydantic", "dict_enum"): [{"red": 1}],
    ("pydantic", "v1_literal"): [{"value": "cat"}],
    ("pydantic", "v1_enum_default"): [{"value": "blue"}, {}],
    ("pydantic", "http_url"): ["https://example.com/"],
    ("pydantic", "decimal"): [1.5, "2.50", "-.5", "+7."],
    ("others", "njsonschema"): [{"FirstProperty": 3, "Summary": "s"}],
    ("others", "draft_4"): [{"price": 0.5, "pair": [1, "a"]}],
    ("others", "anchors"): [{"at": {"x": 1}, "by": {"x": 2}}],
    ("others", "pointer_escapes"): [{"a": 1, "b": "t", "c": True}],
    ("others", "required_either"): [{"a": "x"}, {"b": "y"}, {"a": "x", "b": "y"}],
    ("others", "schemars"): [{"id": 7, "ratio": 0.5, "shape": {"r": 1, "type": "circle"}}],
}


@pytest.mark.parametrize("which", VALID, ids="-".join)
def test_what_a_person_would_answer_is_let_through(which: tuple[str, str]) -> None:
    schema, grammar = WRITTEN[which], compiled(WRITTEN[which])
    for value in VALID[which]:
        oracle_of(schema).validate(value)
        assert accepts(grammar, written(value)), value


LEFT_OUT: list[tuple[Any, list[str]]] = [
    ({"type": "array", "uniqueItems": True}, ["schema.uniqueItems"]),
    ({"type": "number", "multipleOf": 0.1}, ["schema.multipleOf"]),
    ({"type": "string", "format": "shoe size"}, ["schema.format"]),
    ({"type": "string", "pattern": r"(a)\1"}, ["schema.pattern"]),
    ({"type": "object", "not": {"required": ["a"]}}, ["schema.not"]),
    ({"if": {"required": ["a"]}, "then": {"required": ["b"]}, "type": "object"}, ["schema.if"]),
    ({"type": "object", "dependencies": {"a": ["b"]}}, ["schema.dependentRequired"]),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["schema.oneOf"]),
    ({"properties": {"a": {"$ref": "https://a.b/c"}}}, ["schema.properties.a.$ref"]),
    ({"type": "array", "contains": {"const": 1}}, ["schema.contains"]),
]


@pytest.mark.parametrize(("schema", "paths"), LEFT_OUT, ids=lambda x: str(x)[:50])
def test_what_cannot_be_enforced_is_named_or_when_strict_refused(
    schema: Any, paths: list[str]
) -> None:
    assert list(plain_schema(schema, strict=False).left_out) == paths
    compiled(schema)
    if paths != ["schema.oneOf"]:  # there xgrammar must prove it
        with pytest.raises(SchemaError) as caught:
            plain_schema(schema)
        assert paths[0] in str(caught.value) and "\n" not in str(caught.value)


EQUAL: list[tuple[Any, Any]] = [  # two ways to say the same
    ({"const": "a", "enum": ["a", "b"], "type": "string"}, {"enum": ["a"]}),
    ({"type": "integer", "format": "int32", "x-ui": 1, "xml": {}}, {"type": "integer"}),
    (
        {"type": "number", "minimum": 1, "exclusiveMinimum": False},
        {"type": "number", "minimum": 1},
    ),
    (
        {"allOf": [{"type": "number"}, {"minimum": 2}, {"maximum": 5}]},
        {"type": "number", "minimum": 2, "maximum": 5},
    ),
    ({"allOf": [{"type": "integer"}], "maximum": 3}, {"type": "integer", "maximum": 3}),
    ({"anyOf": [{"const": 1}, {"const": 2}], "type": "string"}, None),
    ({"anyOf": [{"not": {}}, {"const": 2}]}, {"enum": [2]}),
    (
        {"oneOf": [{"maximum": 3}, {"minimum": 4}], "type": "integer"},
        {"anyOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]},
    ),
    ({"type": "integer", "minimum": 0, "maximum": 10, "multipleOf": 5}, {"enum": [0, 5, 10]}),
    (
        {"type": "array", "items": [{"const": 1}], "additionalItems": False},
        {"type": "array", "items": False, "prefixItems": [{"enum": [1]}]},
    ),
    (
        {"type": "array", "items": False},
        {"type": "array", "items": {"type": "null"}, "maxItems": 0},
    ),
    ({"type": "string", "format": "uuid", "pattern": "^[0-9a-f-]{36}$", "maxLength": 36}, ...),
    ({"type": "string", "pattern": "^$|^[a-f]+$"}, ...),
    ({"type": "string", "pattern": "^(?!^0*$)[0-9]+$"}, ...),
    ({"type": "string", "pattern": r"^\$[$^]$"}, {"type": "string", "pattern": r"^\$[$^]$"}),
    ({"type": "string", "maxLength": 2, "minLength": 5}, None),
    ({"type": "string", "pattern": "^a+$", "format": "date"}, None),
    ({"allOf": [{"const": 1}, {"const": True}]}, None),
    ({"$ref": "#/$defs/a", "$defs": {"a": False}}, None),
]


@pytest.mark.parametrize(("schema", "wanted"), EQUAL, ids=lambda x: str(x)[:50])
def test_schemas_are_said_in_plain_words(schema: Any, wanted: Any) -> None:
    """None: nothing satisfies it. ...: taken, and no part is left out."""
    if wanted is None:
        with pytest.raises(SchemaError):
            plain_schema(schema, strict=False)
    elif wanted is ...:
        assert plain_schema(schema).left_out == ()
    else:
        assert plain_schema(schema).schema == wanted
