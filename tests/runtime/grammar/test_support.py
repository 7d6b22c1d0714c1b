"""What xgrammar enforces by version: refused where it does not, and the same in other words else.

The grammars are the installed xgrammar's; `make test-xgrammar` runs this with 0.1.25.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import Any

import pytest
import torch
import xgrammar
from jsonschema import Draft202012Validator

from enginehouse.runtime.errors import EngineError, RequestError
from enginehouse.runtime.grammar.automata import automata_error
from enginehouse.runtime.grammar.child import Job, build_grammar, try_grammar
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import (
    NEWEST,
    OLDEST,
    SINCE,
    Support,
    installed,
)
from enginehouse.runtime.request import Constraint, ConstraintKind
from enginehouse.runtime.tensorrt_llm.sampling import guided_fields
from makers.schemas import GOOD, NEWER, obj

OLD = Support(OLDEST)
VOCABULARY = [b"", *(bytes([code]) for code in range(1, 256)), b""]
STOP = 256
FORMATS = ("json-pointer", "relative-json-pointer", "ipv6", "ipv4", "date", "date-time", "uuid")
STRINGS = {f"format {name}": {"type": "string", "format": name} for name in FORMATS}
PATTERNS = [
    "a|b",
    "^a|b$",
    r"\x41b",
    r"^\x61\u00e9$",
    "^(?:é|ü)+$",
    "^(a|)b?$",
    "[ -~]{2}",
    r"[^@]+@[^@\s]*",
    r"^\D{2,}x\W*$",
    r"x[\s\S]*",
]
STRINGS |= {f"pattern {text}": {"type": "string", "pattern": text} for text in PATTERNS}
STRINGS |= {
    "long": {"type": "string", "minLength": 3},
    "names": {"type": "object", "propertyNames": {"pattern": "a|b"}, "maxProperties": 2},
    "named": {
        "type": "object",
        "patternProperties": {"a|b": {"const": 1}},
        "additionalProperties": False,
    },
}


@cache
def vocabulary() -> xgrammar.TokenizerInfo:
    return xgrammar.TokenizerInfo(
        VOCABULARY, xgrammar.VocabType.RAW, vocab_size=len(VOCABULARY), stop_token_ids=[STOP]
    )


def compiled(kind: ConstraintKind, value: str, support: Support) -> xgrammar.CompiledGrammar:
    """What the engine would follow; RequestError where it would refuse."""
    checked = check(Constraint(kind, value), support)
    verdict = try_grammar(vocabulary(), Job(checked.kind, checked.value, 10.0))
    if verdict.error is not None:
        raise RequestError(verdict.error)
    return build_grammar(vocabulary(), checked.kind, checked.value).grammar


def allowed(matcher: xgrammar.GrammarMatcher) -> list[int]:
    mask = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    matcher.fill_next_token_bitmask(mask)
    bits = (mask[0, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.flatten()[: len(VOCABULARY)].nonzero().flatten().tolist()


def takes(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return all(map(matcher.accept_token, text.encode())) and STOP in allowed(matcher)


def noise(grammar: xgrammar.CompiledGrammar, seed: int) -> str | None:
    """A text of bytes that know nothing, UTF-8 included; None for one that takes too long."""
    choose, matcher, data = random.Random(seed), xgrammar.GrammarMatcher(grammar), b""
    while len(data) < 200:
        tokens = allowed(matcher)
        assert tokens, data
        if STOP in tokens and (len(tokens) == 1 or choose.random() < 0.3):
            return data.decode(errors="replace")
        printable = [token for token in tokens if token < 128]
        token = choose.choice(printable if printable and choose.random() < 0.7 else tokens)
        if token != STOP:
            assert matcher.accept_token(token), data
            data += bytes([token])
    return None


@pytest.mark.parametrize("name", [*GOOD, *STRINGS])
def test_whatever_the_bytes_what_is_accepted_validates(name: str) -> None:
    schema = (GOOD | STRINGS)[name]
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        grammar = compiled(ConstraintKind.JSON_SCHEMA, json.dumps(schema), installed())
    except RequestError as error:
        assert name in NEWER and not installed().is_newest, error.message
        return
    texts = [text for seed in range(40) if (text := noise(grammar, seed)) is not None]
    assert texts
    for text in texts:
        validator.validate(json.loads(text))


def test_the_oldest_refuses_what_it_does_not_enforce_and_nothing_else() -> None:
    refused = set()
    for name, schema in GOOD.items():
        constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema), "p")
        assert check(constraint, NEWEST)
        try:
            check(constraint, OLD)
        except RequestError as error:
            words = r".+ needs xgrammar 0\.2\.8 or later, and this engine uses 0\.1\.25; .+"
            assert re.fullmatch(words, error.message), error.message
            assert (error.param, error.code) == ("p", "invalid_value")
            refused.add(name)
    assert refused == NEWER


J, R, E, T = (
    ConstraintKind.JSON_SCHEMA,
    ConstraintKind.REGEX,
    ConstraintKind.EBNF,
    ConstraintKind.STRUCTURAL_TAG,
)


def tag(**form: Any) -> str:
    return json.dumps({"type": "structural_tag", "format": form})


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (J, {"type": "integer", "multipleOf": 7}, "schema.multipleOf"),
        (J, {"type": "number", "minimum": 0}, "schema.minimum of a number"),
        (J, {"type": "integer", "maximum": -5}, "schema: this range of integers"),
        (J, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "such as 0 to 99999"),
        (J, {"type": "integer", "minimum": -123456789}, "this range of integers"),
        (J, {"type": "string", "maxLength": 5}, "such as ^[ -~]{0,5}$"),
        (J, {"type": "string", "pattern": "^.$"}, "schema.pattern: '.'"),
        (J, {"type": "string", "pattern": "(a$|b)"}, "'$' within"),
        (J, obj(**{'q"': {"const": 1}}), "JSON writes with an escape"),
        (
            J,
            {
                "type": "object",
                "propertyNames": {"pattern": "^a+$"},
                "additionalProperties": {"const": 1},
            },
            "schema.propertyNames beside",
        ),
        (J, {"oneOf": [{"enum": [1, 2]}, {"enum": [3, 4]}]}, "write anyOf"),
        (R, "[^a]", "'[^a]'"),
        (R, r"\D", "characters beyond ASCII"),
        (R, "a$b", "'$' within"),
        (E, "root ::= [\u00e0-\u00fc]", "the class [\u00e0-\u00fc]"),
        (E, r"root ::= [^\u4e2d]", r"the class [^\u4e2d]"),
        (T, tag(type="regex", pattern="."), "'.'"),
        (T, tag(type="grammar", grammar="root ::= [\u00fc]"), "the class [\u00fc]"),
        (
            T,
            tag(type="json_schema", json_schema={}, max_whitespace_cnt=2),
            "the field 'max_whitespace_cnt' of 'json_schema'",
        ),
        (T, tag(type="json_schema", json_schema={"type": "string", "maxLength": 2}), "maxLength"),
        (T, tag(type="any_text", excludes=["x"]), "the field 'excludes' of 'any_text'"),
        (T, tag(type="star", content={"type": "any_text"}), "of 'star'"),
        (
            T,
            tag(
                type="triggered_tags",
                triggers=["<"],
                tags=[{"begin": "<", "content": {"type": "any_text"}, "end": ">", "colour": 1}],
            ),
            "the field 'colour' of 'tag'",
        ),
    ],
)
def test_a_refusal_says_what_is_wanted(kind: ConstraintKind, value: Any, words: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(RequestError) as caught:
        check(Constraint(kind, text), OLD)
    message = caught.value.message
    assert words in message and "\n" not in message and len(message) < 400
    assert "needs xgrammar 0.2.8 or later, and this engine uses 0.1.25" in message
    with pytest.raises(RequestError):  # and so it is beside TensorRT-LLM, whatever is installed
        guided_fields(Constraint(kind, text))


RANGES = [
    *({"minimum": low} for low in (-273, -99, -3, -1, 0, 1, 2, 9, 10, 11, 137, 1999)),
    *({"maximum": high} for high in (0, 1, 9, 116, 999, 1000, 86400)),
    *(
        {"minimum": low, "maximum": high}
        for low, high in (
            *((-99, 99), (1, 1000), (7, 7), (-5, 120), (98, 137), (1, 65535), (-273, 5000)),
            *((-136, 116), (-1999, -137), (1024, 49151), (300, 300), (0, 10**9)),
        )
    ),
    {"exclusiveMinimum": 0.5, "exclusiveMaximum": 20},
    {"minimum": 8, "exclusiveMinimum": 5, "maximum": 20, "exclusiveMaximum": 25},
]


@pytest.mark.parametrize("bounds", RANGES, ids=str)
def test_a_range_of_integers_is_the_same_in_other_words(bounds: dict[str, float]) -> None:
    schema = {"type": "integer", **bounds}
    validator = Draft202012Validator(schema)
    grammar = compiled(J, json.dumps(schema), OLD)
    edges = [int(bound) + i for bound in bounds.values() for i in range(-12, 13)]
    values = {*edges, *(-edge for edge in edges), *(10 * edge for edge in edges), 10**12, -(10**12)}
    for edge in edges:  # the same digits but for one
        digits = str(abs(edge))
        for i in range(len(digits)):
            near = [int(digits[:i] + digit + digits[i + 1 :]) for digit in "0159"]
            values |= {*near, *(-number for number in near)}
    for value in values:
        assert takes(grammar, str(value)) == validator.is_valid(value), value
    assert not any(takes(grammar, text) for text in ("", "-", "00", "+1", "01", "1.5"))


def test_alternatives_and_lengths_are_the_same_in_other_words() -> None:
    either = compiled(J, '{"type": "string", "pattern": "^ab|c$"}', OLD)
    assert [takes(either, text) for text in ('"ab"', '"c"', '"ab', 'c"', '"ac"')] == [
        *(True, True, False, False, False)
    ]
    for text in ("", "ab", "abc", "\u00e9\u6f22\U0001f642", "\u6f22" * 50):
        grammar = compiled(J, '{"type": "string", "minLength": 3}', OLD)
        assert takes(grammar, json.dumps(text, ensure_ascii=False)) == (len(text) >= 3)


def test_what_is_left_out_of_ascii_is_left_out_in_every_version() -> None:
    address = "[^@\\n]+@[^@]*"
    in_json = compiled(J, json.dumps({"type": "string", "pattern": address}), OLD)
    for text in ("a@b", "\u00fc\u6f22@\U0001f642", "a@", "@b", "a@b@c", 'a"@b', "a\\@b", "a\n@b"):
        wanted = bool(re.fullmatch(address, text)) and not re.search(r'["\\\n]', text)
        assert takes(in_json, f'"{text}"') == wanted, text
        assert takes(compiled(R, address, OLD), text) == bool(re.fullmatch(address, text)), text


def test_an_automaton_that_takes_more_than_its_rule_is_seen() -> None:
    """As 0.1.25 makes one of bat, cat and car; a newer one is made to look like it."""
    bytes_ = [[97, 97, 3], [98, 98, 1], [99, 99, 1], [114, 114, 0], [116, 116, 0]]
    graph = {"data_": bytes_, "indptr_": [0, 0, 1, 3, 5]}
    words = [list(word.encode()) for word in ("bat", "cat", "car")]
    grammar: dict[str, Any] = {
        "__VERSION__": "v6",
        "rules": [["root", 6, -1, False]],
        "grammar_expr_data": [0, 5, 8, 13, 16, 21, 24],
        "grammar_expr_indptr": [
            *(0, 3, *words[0], 5, 1, 0, 0, 3, *words[1], 5, 1, 2, 0, 3, *words[2], 5, 1, 4),
            *(6, 3, 1, 3, 5),
        ],
        "per_rule_fsms": [[graph, 2, [0], False]],
    }
    assert "a wrong automaton of its rule 'root'" in str(automata_error(json.dumps(grammar)))
    right = [[97, 97, 1], [116, 116, 4], [97, 97, 3], [114, 114, 4], [116, 116, 4]]
    graph |= {"data_": [*right, [98, 98, 0], [99, 99, 2]], "indptr_": [0, 1, 2, 3, 5, 5, 7]}
    grammar["per_rule_fsms"] = [[graph, 5, [4], False]]
    assert automata_error(json.dumps(grammar)) is None
    assert "cannot be checked" in str(automata_error('{"__VERSION__": "v12"}'))


@pytest.mark.parametrize("words", [("bat", "cat", "car"), ("cat", "car", "bat"), ("low", "high")])
def test_a_choice_is_followed_exactly_or_refused(words: tuple[str, ...]) -> None:
    try:
        grammar = compiled(ConstraintKind.CHOICE, json.dumps(words), installed())
    except RequestError as error:
        assert words[0] == "bat" and "wrong automaton" in error.message
        assert not installed().has("automata that are right")
        return
    for text in ("bat", "cat", "car", "bar", "low", "high", "hat", "ca", ""):
        assert takes(grammar, text) == (text in words), text


def test_a_version_counts_as_the_nearest_lower_one_that_is_known() -> None:
    assert [Support(v).is_newest for v in ("0.1.32", "0.2.7", "0.2.8", "0.2.10", "1.0")] == [
        *(False, False, True, True, True)
    ]
    assert not any(map(OLD.has, SINCE))
    with pytest.raises(EngineError, match=r"xgrammar 0\.1\.24 is installed; wanted 0\.1\.25"):
        Support("0.1.24")


def test_white_space_of_tags_is_bounded_where_that_is_known() -> None:
    plain = tag(type="json_schema", json_schema={"type": "object"})
    spaces = {
        support.version: json.loads(check(Constraint(T, plain), support).value)["format"].get(
            "max_whitespace_cnt"
        )
        for support in (OLD, NEWEST)
    }
    assert spaces == {OLD.version: None, NEWEST.version: 1}
