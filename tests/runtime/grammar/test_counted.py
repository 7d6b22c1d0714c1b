"""Strings of a bounded length are counted, to the character, and cost no state for each."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import regex
import xgrammar

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar import compiler as compiler_module
from enginehouse.runtime.grammar.child import build_grammar
from enginehouse.runtime.grammar.compiler import GrammarCompiler
from enginehouse.runtime.grammar.constraint import check
from enginehouse.runtime.grammar.support import installed
from enginehouse.runtime.request import Constraint, ConstraintKind

# Tokens of several characters, of half a character, and across either quote.
WORDS = ["", '"', "a", "b", "ab", "aab", "bbbbb", "é", "aé", '"a', 'a"', '""', '"ab"', "x", "-"]
TOKENS = [word.encode() for word in WORDS] + [b"\xc3", b"\xa9", b"\xa9a", b'{"p": "', b'"}']
INFO = xgrammar.TokenizerInfo(
    TOKENS, xgrammar.VocabType.RAW, vocab_size=len(TOKENS), stop_token_ids=[0]
)


def compiled(kind: ConstraintKind, value: Any) -> xgrammar.CompiledGrammar:
    text = value if isinstance(value, str) else json.dumps(value)
    checked = check(Constraint(kind, text), installed())
    return build_grammar(INFO, checked.kind, checked.value).grammar


def accepts(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


def allowed(matcher: xgrammar.GrammarMatcher) -> set[int]:
    bitmask = xgrammar.allocate_token_bitmask(1, len(TOKENS))
    matcher.fill_next_token_bitmask(bitmask)
    return {i for i in range(len(TOKENS)) if int(bitmask[0, i // 32]) >> (i % 32) & 1}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 9), (0, 100), (1, 10), (3, 12), (4, 40), (9, 2083), (0, 65536)]
)
def test_a_string_is_as_long_as_its_bounds_allow(low: int, high: int) -> None:
    grammar = compiled(
        ConstraintKind.JSON_SCHEMA, {"type": "string", "minLength": low, "maxLength": high}
    )
    for length in (0, 1, low - 1, low, low + 1, high - 1, high, high + 1):
        for char in ("a", "é", "\U0001f600"):
            if length >= 0:
                text = char * length
                assert accepts(grammar, f'"{text}"') == (low <= len(text) <= high), (char, length)


def test_long_bounds_in_patterns_of_ascii_cost_no_automaton_of_their_own() -> None:
    """xgrammar reads each of these in seconds. Time is the processor's: others may be at work."""
    names = [f"a{n}" for n in range(10)]
    patterns = {name: f"^[a-b]{{1,{10_000 - n}}}$" for n, name in enumerate(names)}
    properties = {name: {"type": "string", "pattern": text} for name, text in patterns.items()}
    schema = {"type": "object", "properties": properties, "required": names}
    tag = {"begin": "x", "content": {"type": "json_schema", "json_schema": schema}, "end": "-"}
    value = json.dumps(dict.fromkeys(names, "ab"))
    longer = json.dumps({**dict.fromkeys(names, "ab"), "a9": "a" * 9992})
    tagged = {"type": "structural_tag", "format": {"type": "tag", **tag}}
    began_s = time.process_time()
    plain = compiled(ConstraintKind.JSON_SCHEMA, schema)
    wrapped = compiled(ConstraintKind.STRUCTURAL_TAG, tagged)
    assert time.process_time() - began_s < 1
    assert accepts(plain, value) and not accepts(plain, longer)
    assert accepts(wrapped, f"x{value}-") and not accepts(wrapped, f"x{longer}-")


def test_a_value_that_looks_like_a_bounded_pattern_stays_as_it_is() -> None:
    looks = {"pattern": "^a{1,99}$"}
    schema = {"anyOf": [{"enum": [looks]}, {"type": "string", **looks}]}
    grammar = compiled(ConstraintKind.JSON_SCHEMA, schema)
    texts = json.dumps(looks, separators=(",", ":")), '"aa"', '"b"'
    assert [accepts(grammar, text) for text in texts] == [True, True, False]


BOUNDED = [
    ({"type": "string", "maxLength": 9}, r'"[^"\\]{0,9}"'),
    ({"type": "string", "minLength": 2, "maxLength": 11}, r'"[^"\\]{2,11}"'),
    ({"type": "string", "minLength": 5, "maxLength": 14}, r'"[^"\\]{5,14}"'),
    ({"type": "string", "pattern": "^x[ab]{1,10}-[aé]{0,9}$"}, r'"x[ab]{1,10}-[aé]{0,9}"'),
    ({"type": "string", "pattern": "^a{0,9}[ab]{9,10}$"}, r'"a{0,9}[ab]{9,10}"'),
    (
        {"anyOf": [{"type": "string", "maxLength": 12}, {"pattern": "^a*$", "type": "string"}]},
        r'"([^"\\]{0,12}|a*)"',
    ),
]


@pytest.mark.parametrize(("schema", "pattern"), BOUNDED, ids=lambda x: str(x)[:40])
def test_the_tokens_allowed_are_those_that_a_text_of_the_language_goes_on_with(
    schema: dict[str, Any], pattern: str
) -> None:
    """Walked at random, with tokens of several characters, of half a one, and across quotes."""
    grammar = compiled(ConstraintKind.JSON_SCHEMA, schema)
    language = Prefixes(pattern)
    choose = random.Random(7)
    for _ in range(12):
        matcher, text = xgrammar.GrammarMatcher(grammar), b""
        for _ in range(25):
            found = allowed(matcher)
            wanted = {i for i, token in enumerate(TOKENS) if i and language.has(text + token)}
            wanted |= {0} if language.is_whole(text) else set()
            assert found == wanted, (text, [TOKENS[i] for i in found ^ wanted])
            token = choose.choice(sorted(found))
            if token == 0:
                break
            assert matcher.accept_token(token)
            text += TOKENS[token]


class Prefixes:
    """Whether bytes begin a text of a pattern, by another library's partial matching."""

    def __init__(self, pattern: str) -> None:
        self._pattern = regex.compile(pattern)

    def has(self, text: bytes) -> bool:
        """A character cut in half is one that the rest of it completes."""
        for more in (b"", b"\xa9"):
            try:
                whole = (text + more).decode()
            except UnicodeDecodeError:
                continue
            if self._pattern.fullmatch(whole, partial=True):
                return True
        return False

    def is_whole(self, text: bytes) -> bool:
        return self._pattern.fullmatch(text.decode(errors="replace")) is not None


def test_a_longer_bound_costs_no_more_memory() -> None:
    sizes = {
        compiled(
            ConstraintKind.REGEX, f"^Title: .{{1,{n}}}\\nSummary: .{{1,{n}}}$"
        ).memory_size_bytes
        for n in (20, 500, 10_000)
    }
    assert max(sizes) - min(sizes) < 200  # names of rules


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ConstraintKind.REGEX, "^a: .{1,100}\\nb: .{1,500}$"),
        (ConstraintKind.EBNF, 'root ::= "a: " c{1,100} "\\nb: " c{1,500}\nc ::= [^\\n]'),
        (
            ConstraintKind.STRUCTURAL_TAG,
            {
                "type": "structural_tag",
                "format": {"type": "regex", "pattern": "a: .{1,100}\\nb: .{1,500}"},
            },
        ),
    ],
    ids=lambda x: str(x)[:20],
)
def test_every_kind_of_constraint_counts(kind: ConstraintKind, value: Any) -> None:
    grammar = compiled(kind, value)
    for first, second in [(1, 1), (100, 500), (0, 1), (101, 1), (1, 501)]:
        text = f"a: {'é' * first}\nb: {'b' * second}"
        assert accepts(grammar, text) == (1 <= first <= 100 and 1 <= second <= 500)


def test_verdicts_are_remembered_and_what_was_lost_is_tried_again(
    make_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[bytes] = []
    asked: list[bytes] = []
    real = compiler_module._Child.run

    def run(child: Any, job: bytes) -> bytes:
        asked.append(job)
        return answers.pop() if answers else real(child, job)

    monkeypatch.setattr(compiler_module._Child, "run", run)
    grammars = GrammarCompiler(make_engine(), 512, (0,))
    try:
        refused = Constraint(ConstraintKind.EBNF, "root ::= missing")
        good = Constraint(ConstraintKind.REGEX, "[ab]{1,500}")
        for constraint, fails in ((refused, True), (good, False)):
            tries = [grammars.compile(constraint) for _ in range(2)]
            wait(tries)
            tries.append(grammars.compile(constraint))
            assert len(set(map(id, tries))) == 1
            assert isinstance(tries[0].exception(), RequestError) == fails
        assert len(asked) == 2
        answers.append(b"")
        lost = Constraint(ConstraintKind.REGEX, "[ab]{1,501}")
        assert isinstance(grammars.compile(lost).exception(), RequestError)
        assert grammars.compile(lost).result().memory_size_bytes > 0
    finally:
        grammars.close()
