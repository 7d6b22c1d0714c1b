"""Whether the automata that an older xgrammar made of a grammar take what the grammar says.

Before 0.2.1 states are merged that differ: of "bat" | "cat" | "car" it makes one that takes "bar".
A compiled grammar holds both its rules and the automaton of each, so they can be compared. A rule
without an automaton is followed as it is written.
Source: xgrammar 0.1.25, `Grammar.serialize_json`, `grammar_impl.h` and `fsm.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from enginehouse.runtime.grammar.regex_classes import complement

MAX_STATES = 50_000  # compared in all, in a second or two
_FORMATS = ("v6", "v7", "v8", "v9")  # of 0.1.25 to 0.1.32

_BYTES, _, _CLASS_STAR, _, _RULE, _SEQUENCE, _CHOICES = range(7)
_RULE_EDGE = -2
_TAIL = (0x80, 0xBF)
# What a negated class takes beyond ASCII: a first byte and 1 to 3 that continue it.
_BEYOND_ASCII = [((0xC0, 0xDF), 1), ((0xE0, 0xEF), 2), ((0xF0, 0xF7), 3)]

States = frozenset[int]
Edge = tuple[int, int, int]  # lowest and highest byte, target; or _RULE_EDGE, the rule, target


class Automaton:
    """States are numbers; a state may have several edges for one byte. edges: those of a state."""

    def __init__(
        self, edges: Callable[[int], list[Edge]], starts: Iterable[int], ends: Iterable[int]
    ) -> None:
        self._edges = edges
        self.starts = frozenset(starts)
        self.ends = frozenset(ends)

    def edges_of(self, states: States) -> list[Edge]:
        return [edge for state in states for edge in self._edges(state)]


def automata_error(serialized: str) -> str | None:
    """Why a compiled grammar cannot be trusted, if so. serialized: what its serialize_json says."""
    grammar = msgspec.json.decode(serialized)
    if grammar["__VERSION__"] not in _FORMATS:
        return "this xgrammar makes automata that cannot be checked; install 0.1.25, or a newer one"
    left = MAX_STATES
    for (name, body, *_), automaton in zip(grammar["rules"], grammar["per_rule_fsms"], strict=True):
        kind, choices = _expression(grammar, body)
        if automaton is None or kind != _CHOICES:
            continue
        left = _compare(_written(grammar, choices), _made(automaton), left)
        if left <= 0:
            return (
                f"xgrammar before 0.2.1 makes a wrong automaton of its rule {name[:40]!r}, or one "
                "too large to check; name the alternatives in another order, or fewer of them"
            )
    return None


def _expression(grammar: dict[str, Any], index: int) -> tuple[int, list[int]]:
    """The kind of an expression and its numbers. The names of the two lists are swapped in it."""
    data, start = grammar["grammar_expr_indptr"], grammar["grammar_expr_data"][index]
    return data[start], data[start + 2 : start + 2 + data[start + 1]]


def _made(automaton: Any) -> Automaton:
    graph, start, ends = automaton[:3]
    graph = graph.get("edges", graph)
    data, offsets = graph["data_"], graph["indptr_"]
    return Automaton(lambda state: data[offsets[state] : offsets[state + 1]], [start], ends)


def _written(grammar: dict[str, Any], choices: list[int]) -> Automaton:
    """What the choices of a rule say: one path of states for each."""
    edges: list[list[Edge]] = []
    starts, ends = [], []

    def new() -> int:
        edges.append([])
        return len(edges) - 1

    for choice in choices:
        kind, elements = _expression(grammar, choice)
        starts.append(state := new())
        for element in elements if kind == _SEQUENCE else []:
            kind, values = _expression(grammar, element)
            if kind == _BYTES:
                for byte in values:
                    edges[state].append((byte, byte, target := new()))
                    state = target
            elif kind == _RULE:
                edges[state].append((_RULE_EDGE, values[0], target := new()))
                state = target
            else:
                loop = kind == _CLASS_STAR
                target = state if loop and not edges[state] else new()
                for low, high, num_more in _class_bytes(values):
                    at = state
                    for _ in range(num_more):
                        edges[at].append((low, high, middle := new()))
                        at, (low, high) = middle, _TAIL
                    edges[at].append((low, high, target))
                state = target
        ends.append(state)
    return Automaton(edges.__getitem__, starts, ends)


def _class_bytes(values: list[int]) -> Iterator[tuple[int, int, int]]:
    """The ranges of first bytes that a class takes, and how many bytes go on from there."""
    negated, bounds = values[0], values[1:]
    ranges = list(zip(bounds[::2], bounds[1::2], strict=True))
    if not negated:
        yield from ((low & 0xFF, high & 0xFF, 0) for low, high in ranges)  # as 0.1.25 has it
        return
    for low, high in complement(ranges):
        if low < 0x80:
            yield low, min(high, 0x7F), 0
    for (low, high), num_more in _BEYOND_ASCII:
        yield low, high, num_more


def _compare(wanted: Automaton, made: Automaton, left: int) -> int:
    """How many states are left to compare after these; 0 where the two differ."""
    seen = {(wanted.starts, made.starts)}
    pending = list(seen)
    while pending and left > 0:
        both = pending.pop()
        left -= 1
        if bool(both[0] & wanted.ends) != bool(both[1] & made.ends):
            return 0
        for pair in _successors(wanted.edges_of(both[0]), made.edges_of(both[1])):
            if not pair[0] or not pair[1]:
                return 0
            if pair not in seen:
                seen.add(pair)
                pending.append(pair)
    return left


def _successors(first: list[Edge], second: list[Edge]) -> Iterator[tuple[States, States]]:
    """Where each byte and each rule leads in the one and in the other."""
    edges = [*first, *second]
    rules = {high for low, high, _ in edges if low == _RULE_EDGE}
    for rule in rules:
        yield _after(first, _RULE_EDGE, rule), _after(second, _RULE_EDGE, rule)
    bytes_from = {low for low, _, _ in edges if low >= 0}
    bytes_from |= {high + 1 for low, high, _ in edges if low >= 0}
    for byte in sorted(bytes_from)[:-1]:
        pair = _after(first, byte), _after(second, byte)
        if pair[0] or pair[1]:
            yield pair


def _after(edges: list[Edge], label: int, rule: int = 0) -> States:
    if label == _RULE_EDGE:
        return frozenset(t for low, high, t in edges if low == label and high == rule)
    return frozenset(target for low, high, target in edges if 0 <= low <= label <= high)
