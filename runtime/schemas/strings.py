"""Strings of a schema: patterns, formats and lengths together, as one pattern or as lengths.

A pattern alone is for the whole string, as `grammar/` has it. Beside others it is looked for in the
string, as JSON Schema has it, or two of them would exclude each other.
Source: JSON Schema 2020-12, validation, sections 6.3 and 7.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from enginehouse.runtime.grammar.json_scalars import exact_pattern
from enginehouse.runtime.grammar.json_schema import MAX_LENGTH, MAX_REPEAT
from enginehouse.runtime.grammar.string_formats import BUILT_IN, COMBINED
from enginehouse.runtime.grammar.string_formats import PATTERNS as FORMATS_HERE
from enginehouse.runtime.grammar.support import NEWEST, SchemaError
from enginehouse.runtime.schemas.automaton import (
    Automaton,
    automaton,
    difference,
    intersection,
    tree_of,
)
from enginehouse.runtime.schemas.effort import TooMuch
from enginehouse.runtime.schemas.merged import FORMATS, PATTERNS, Node, Nothing
from enginehouse.runtime.schemas.regex_tree import (
    ANYTHING,
    Tree,
    at_least,
    at_most,
    lengths,
    parse,
    text_of,
)

LeaveOut = Callable[[str, str], None]
_LONGEST = 16_000  # characters of a pattern that others were made into
_ANCHOR = re.compile(r"\\.|\[[^\]]*\]|([$^])", re.S)  # and what may hold one that is none


def plain_string(node: Node, path: str, leave_out: LeaveOut) -> Node:
    """Nothing where the parts exclude each other."""
    low, high = _length(node, "minLength", path, MAX_REPEAT), _length(node, "maxLength", path, None)
    if high is not None and (low or 0) > high:
        raise Nothing(f"{path}.minLength is above maxLength; nothing satisfies it")
    patterns = list(dict.fromkeys(_patterns(node, path)))
    formats = _formats(node, path, bool(patterns), leave_out)
    bounds = {"minLength": low, "maxLength": high}
    lengths_alone: Node = {k: v for k, v in bounds.items() if v is not None}
    if len(patterns) + len(formats) + bool(lengths_alone) <= 1:
        if patterns:
            return _alone(patterns[0], path, leave_out)
        return {"type": "string", **lengths_alone, **({"format": formats[0]} if formats else {})}
    trees: list[Tree] = []
    for pattern in patterns:
        try:
            trees.append(parse(pattern))
        except SchemaError as error:
            leave_out(f"{path}.pattern", f"cannot be combined: {error}")
    trees += [parse(FORMATS_HERE.get(name) or COMBINED[name], whole=True) for name in formats]
    if not trees:
        return {"type": "string", **lengths_alone}
    tree = _together(trees, f"{path}.{'pattern' if patterns else 'format'}", leave_out)
    short = _within(tree, low or 0, high)
    if short is None:
        names = " and ".join(lengths_alone)
        leave_out(f"{path}.{next(iter(lengths_alone))}", f"cannot be kept beside the rest: {names}")
        short = tree
    text = text_of(short)
    if len(text) > _LONGEST:
        leave_out(f"{path}.{'pattern' if patterns else 'format'}", "is too large to be combined")
        return {"type": "string", **lengths_alone}
    return {"type": "string", "pattern": f"^({text})$"}


def _alone(pattern: str, path: str, leave_out: LeaveOut) -> Node:
    """As it is, unless it looks ahead, which an automaton does and xgrammar does not, or says of
    each alternative that it is whole, as `^$|^a$` does: xgrammar wants that of all of them at once.
    """
    try:
        spelt = exact_pattern(pattern, f"{path}.pattern", NEWEST)
        tree = parse(pattern, whole=True)
        if _looks(tree):
            language = automaton(tree)
            if language.is_empty:
                raise Nothing(f"{path}.pattern matches nothing")
            tree = tree_of(language)
        elif not _has_anchor_within(spelt):
            return {"type": "string", "pattern": pattern}
        return {"type": "string", "pattern": f"^({text_of(tree)})$"}
    except (Nothing, TooMuch):
        raise
    except SchemaError as error:
        leave_out(f"{path}.pattern", f"cannot be enforced: {error}")
        return {"type": "string"}


def _has_anchor_within(spelt: str) -> bool:
    places = {match.start() for match in _ANCHOR.finditer(spelt) if match[1]}
    return bool(places - {0, len(spelt) - 1})


def _together(trees: list[Tree], where: str, leave_out: LeaveOut) -> Tree:
    """What satisfies all: one of them, where its texts are all of the others' too."""
    if len(trees) == 1 and not _looks(trees[0]):
        return trees[0]
    try:
        languages = [automaton(tree) for tree in trees]
        kept = 0
        whole: Automaton = languages[0]
        alone = not _looks(trees[0])
        for index, other in enumerate(languages[1:], 1):
            if difference(whole, other).is_empty:
                continue
            if difference(other, whole).is_empty:
                whole, kept, alone = other, index, not _looks(trees[index])
                continue
            whole, alone = intersection(whole, other), False
        if whole.is_empty:
            raise Nothing(f"{where} and what stands beside it exclude each other")
        return trees[kept] if alone else tree_of(whole)
    except (Nothing, TooMuch):
        raise
    except SchemaError as error:
        leave_out(where, f"cannot be combined: {error}")
        return next((tree for tree in trees if not _looks(tree)), ANYTHING)


def _within(tree: Tree, low: int, high: int | None) -> Tree | None:
    """The texts of those lengths: all of them where it is simple, else some."""
    short = tree if high is None else at_most(tree, high)
    if short is None:
        return None
    long = at_least(short, low)
    return long if long is not None and lengths(long)[0] >= low else None


def _looks(tree: Tree) -> bool:
    if tree[0] == "look":
        return True
    parts = tree[1] if tree[0] in ("seq", "alt") else tree[1:2] if tree[0] == "rep" else ()
    return any(map(_looks, parts))


def _patterns(node: Node, path: str) -> list[str]:
    patterns: list[str] = node.get(PATTERNS, [])
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SchemaError(f"{path}.pattern is no string; wanted a regular expression")
    return patterns


def _formats(node: Node, path: str, beside: bool, leave_out: LeaveOut) -> list[str]:
    """The formats that are enforced. One that is no standard says no more than its pattern."""
    known = []
    for name in dict.fromkeys(map(str, node.get(FORMATS, []))):
        if name in BUILT_IN or name in FORMATS_HERE:
            known.append(name)
        elif not beside:
            leave_out(
                f"{path}.format",
                f"is {name[:40]!r}; wanted one of {', '.join(sorted({*BUILT_IN, *FORMATS_HERE}))}",
            )
    return known


def _length(node: Node, keyword: str, path: str, most: int | None) -> int | None:
    value = node.get(keyword)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (keyword == "minLength" and value == 0 and type(value) is int):
        return None
    if type(value) is not int or value < 0 or (most is not None and value > most):
        wanted = "0 or more" if most is None else f"a number from 0 to {most}"
        raise SchemaError(f"{path}.{keyword} is {str(value)[:40]}; wanted {wanted}")
    return min(value, MAX_LENGTH)
