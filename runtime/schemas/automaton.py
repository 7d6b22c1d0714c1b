"""Regular languages as automata over code points: intersections, differences, and trees again.

An automaton here is deterministic and has no state that leads nowhere; its start is state 0.
Source: Hopcroft, Motwani, Ullman, Introduction to Automata Theory, chapters 2 to 4.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas.effort import check_effort
from enginehouse.runtime.schemas.regex_tree import EMPTY, Tree, alt, seq

MOST_STATES = 1500
_MOST_TURNED = 160  # states, of an automaton that becomes a tree
Edge = tuple[int, int, int]  # lowest and highest code point, target


class Automaton(NamedTuple):
    edges: list[list[Edge]]
    ends: frozenset[int]

    @property
    def is_empty(self) -> bool:
        return not self.ends


class _Net:
    """A nondeterministic one, built from its end, state 0, backwards."""

    def __init__(self) -> None:
        self.edges: list[list[Edge]] = [[]]
        self.free: list[list[int]] = [[]]  # edges that take no character

    def new(self, edges: list[Edge] | None = None, free: list[int] | None = None) -> int:
        if len(self.edges) > MOST_STATES:
            raise SchemaError("the pattern is too large to be combined with others; shorten it")
        self.edges.append(edges or [])
        self.free.append(free or [])
        return len(self.edges) - 1

    def build(self, tree: Tree, goal: int) -> int:
        """A state from which the tree's texts lead to the goal."""
        kind = tree[0]
        if kind == "chars":
            return self.new([(low, high, goal) for low, high in tree[1]])
        if kind == "seq":
            for part in reversed(tree[1]):
                goal = self.build(part, goal)
            return goal
        if kind == "alt":
            return self.new(free=[self.build(part, goal) for part in tree[1]])
        if kind == "look":
            rest = _determined(self, goal)
            seen = automaton(tree[1])
            both = intersection(rest, seen) if tree[2] else difference(rest, seen)
            return self.embedded(both)
        inner, low, high = tree[1:]
        if high is None:
            loop = self.new()
            self.free[loop] = [goal, self._looped(inner, loop)]
            goal = loop
        last = goal
        for _ in range(0 if high is None else high - low):
            goal = self.new(free=[last, self.build(inner, goal)])
        for _ in range(low):
            goal = self.build(inner, goal)
        return goal

    def _looped(self, inner: Tree, loop: int) -> int:
        if _looks(inner):
            raise SchemaError("the pattern looks ahead within a repeat; write it without")
        return self.build(inner, loop)

    def embedded(self, other: Automaton) -> int:
        numbers = [self.new() for _ in other.edges]
        for state, edges in enumerate(other.edges):
            self.edges[numbers[state]] = [(low, high, numbers[t]) for low, high, t in edges]
            self.free[numbers[state]] = [0] if state in other.ends else []
        return numbers[0]


def automaton(tree: Tree) -> Automaton:
    """Of the texts of a tree. SchemaError for one of too many states."""
    net = _Net()
    return _determined(net, net.build(tree, 0))


def intersection(first: Automaton, second: Automaton) -> Automaton:
    return _product(first, second, False)


def difference(first: Automaton, second: Automaton) -> Automaton:
    """What is of the first and not of the second."""
    return _product(first, second, True)


def tree_of(language: Automaton) -> Tree:
    """Its texts as a tree: states are taken out one by one. SchemaError for too many."""
    language = _smallest(language)
    if len(language.edges) > _MOST_TURNED:
        raise SchemaError("the patterns together are too large; say less with them")
    start, end = -1, -2
    paths: dict[int, dict[int, Tree]] = defaultdict(dict)
    for state, edges in enumerate(language.edges):
        targets: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for low, high, target in edges:
            targets[target].append((low, high))
        for target, ranges in targets.items():
            paths[state][target] = ("chars", tuple(ranges))
        if state in language.ends:
            paths[state][end] = EMPTY
    paths[start][0] = EMPTY
    left = set(range(len(language.edges)))
    while left:
        check_effort()
        into = {s: [a for a in paths if s in paths[a] and a != s] for s in left}
        state = min(left, key=lambda s: (len(into[s]) * len(paths[s]), s))
        left.remove(state)
        out = paths.pop(state, {})
        loop = out.pop(state, None)
        middle = [] if loop is None else [("rep", loop, 0, None)]
        for source in into[state]:
            before = paths[source].pop(state)
            for target, after in out.items():
                path = seq([before, *middle, after])
                known = paths[source].get(target)
                paths[source][target] = path if known is None else alt([known, path])
    return paths[start].get(end, ("alt", ()))


def _looks(tree: Tree) -> bool:
    if tree[0] == "look":
        return True
    parts = tree[1] if tree[0] in ("seq", "alt") else tree[1:2] if tree[0] == "rep" else ()
    return any(map(_looks, parts))


def _determined(net: _Net, start: int) -> Automaton:
    def closure(states: set[int]) -> frozenset[int]:
        found, waiting = set(states), list(states)
        while waiting:
            for target in net.free[waiting.pop()]:
                if target not in found:
                    found.add(target)
                    waiting.append(target)
        return frozenset(found)

    first = closure({start})
    numbers = {first: 0}
    edges: list[list[Edge]] = [[]]
    waiting = [first]
    while waiting:
        check_effort()
        states = waiting.pop()
        out = [edge for state in states for edge in net.edges[state]]
        for low, high, targets in _split(out):
            target = closure(targets)
            if target not in numbers:
                if len(numbers) > MOST_STATES:
                    raise SchemaError("the pattern makes too large an automaton; shorten it")
                numbers[target] = len(edges)
                edges.append([])
                waiting.append(target)
            edges[numbers[states]].append((low, high, numbers[target]))
    ends = frozenset(number for states, number in numbers.items() if 0 in states)
    return _trimmed(edges, ends)


def _split(edges: list[Edge]) -> list[tuple[int, int, set[int]]]:
    cuts = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
    parts = []
    for low, after in zip(cuts, cuts[1:], strict=False):
        targets = {target for a, b, target in edges if a <= low <= b}
        if targets:
            parts.append((low, after - 1, targets))
    return parts


def _product(first: Automaton, second: Automaton, without: bool) -> Automaton:
    """State -1 of the second: it has been left."""
    numbers = {(0, 0): 0}
    edges: list[list[Edge]] = [[]]
    waiting = [(0, 0)]
    while waiting:
        check_effort()
        pair = waiting.pop()
        others = second.edges[pair[1]] if pair[1] >= 0 else []
        shift = len(first.edges)  # the second's states come behind the first's
        both = [*first.edges[pair[0]], *((low, high, t + shift) for low, high, t in others)]
        for low, high, targets in _split(both):
            found = {t >= shift: t if t < shift else t - shift for t in targets}
            if False not in found or (True not in found and not without):
                continue
            target = (found[False], found.get(True, -1))
            if target not in numbers:
                if len(numbers) > MOST_STATES:
                    raise SchemaError("the patterns together are too large; say less with them")
                numbers[target] = len(edges)
                edges.append([])
                waiting.append(target)
            edges[numbers[pair]].append((low, high, numbers[target]))
    ends = frozenset(
        number
        for (a, b), number in numbers.items()
        if a in first.ends and ((b in second.ends) != without)
    )
    return _trimmed(edges, ends)


def _trimmed(edges: list[list[Edge]], ends: frozenset[int]) -> Automaton:
    """Without the states from which no end is reached; the start is kept."""
    sources: dict[int, set[int]] = defaultdict(set)
    for state, out in enumerate(edges):
        for _, _, target in out:
            sources[target].add(state)
    alive, waiting = set(ends), list(ends)
    while waiting:
        for source in sources[waiting.pop()]:
            if source not in alive:
                alive.add(source)
                waiting.append(source)
    kept = sorted(alive | {0})
    number = {state: index for index, state in enumerate(kept)}
    return Automaton(
        [[(a, b, number[t]) for a, b, t in edges[s] if t in alive] for s in kept],
        frozenset(number[s] for s in ends),
    )


def _smallest(language: Automaton) -> Automaton:
    """States that nothing tells apart are one."""
    kind = [int(state in language.ends) for state in range(len(language.edges))]
    while True:
        check_effort()
        signs = [(kind[s], _joined(out, kind)) for s, out in enumerate(language.edges)]
        names: dict[object, int] = {}
        new = [names.setdefault(sign, len(names)) for sign in signs]
        if len(names) == len(set(kind)):
            break
        kind = new
    edges: list[list[Edge]] = [[] for _ in range(max(kind) + 1)]
    for state, out in enumerate(language.edges):
        edges[kind[state]] = list(_joined(out, kind))
    first = kind[0]
    order = [first, *(k for k in range(len(edges)) if k != first)]
    place = {old: index for index, old in enumerate(order)}
    return Automaton(
        [[(a, b, place[t]) for a, b, t in edges[old]] for old in order],
        frozenset(place[kind[s]] for s in language.ends),
    )


def _joined(edges: list[Edge], kind: list[int]) -> tuple[Edge, ...]:
    joined: list[Edge] = []
    for low, high, target in sorted(edges):
        if joined and joined[-1][1] + 1 == low and joined[-1][2] == kind[target]:
            joined[-1] = (joined[-1][0], high, kind[target])
        else:
            joined.append((low, high, kind[target]))
    return tuple(joined)
