"""The table of docs/refused_fields.md, made of the forms that refuse.

    python scripts/refused_fields.py    # writes it into the page, whose other words stay

A form of an endpoint (server/openapi.py has all of them) says what it refuses, and so do the forms
within it; what to do instead is said in server/wire/refused_fields.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from enginehouse.server.openapi import OPERATIONS
from enginehouse.server.wire.refused_fields import INSTEAD
from enginehouse.server.wire.shapes import Shape

PAGE = Path(__file__).resolve().parents[1] / "docs" / "refused_fields.md"
HEAD = "| Field | Of | Passes | Refused by | Instead |\n| --- | --- | --- | --- | --- |\n"
_ALIASES = "/v1/openai/"


class Refused(NamedTuple):
    """field: its path, as `messages[].audio`. passes: the values that ask for nothing."""

    endpoint: str
    field: str
    passes: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.field.rpartition(".")[2]


def all_refused() -> list[Refused]:
    """Every field that the body of an endpoint refuses, once for each endpoint."""
    found: dict[tuple[str, str], Refused] = {}
    for operation in OPERATIONS:
        for body in operation.bodies:
            if issubclass(body, Shape) and not operation.path.startswith(_ALIASES):
                for field, passes in _refused_by(body, ""):
                    found[operation.path, field] = Refused(operation.path, field, passes)
    return list(found.values())


def _refused_by(form: type[Shape], path: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, idle in form.refused.items():
        yield path + name, idle
    for name in form.foreign:
        yield path + name, (_plain(form.model_fields[name].default),)
    for name, info in form.model_fields.items():
        for inner, mark in _forms_in(info.annotation, ""):
            yield from _refused_by(inner, f"{path}{info.alias or name}{mark}.")


def _forms_in(annotation: Any, mark: str) -> Iterator[tuple[type[Shape], str]]:
    """The forms that a field may hold, and `[]` for each list that is around them."""
    if isinstance(annotation, type) and issubclass(annotation, Shape):
        yield annotation, mark
    if get_origin(annotation) is list:
        mark += "[]"
    for inner in get_args(annotation):
        yield from _forms_in(inner, mark)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_defaults=True)
    return value


def table() -> str:
    """A row for each field; endpoints that let other values pass have another row."""
    rows: dict[tuple[str, str], list[Refused]] = {}
    for refused in all_refused():
        values = [f"`{json.dumps(value)}`" for value in refused.passes if value is not None]
        rows.setdefault((refused.field, ", ".join(values)), []).append(refused)
    lines = []
    for (field, passes), found in sorted(rows.items()):
        whose, words = INSTEAD[found[0].name]
        endpoints = ", ".join(refused.endpoint.removeprefix("/v1") for refused in found)
        lines.append(f"| `{field}` | {whose} | {passes} | {endpoints} | {words} |\n")
    return HEAD + "".join(lines).replace("|  |", "| |")


def filled(text: str) -> str:
    """The page with the table as it is now, in the place of the one that it has."""
    begin = re.escape(HEAD.partition("\n")[0])
    made, count = re.subn(rf"^{begin}\n(?:\|.*\n)*", lambda _: table(), text, flags=re.M)
    assert count == 1, f"{PAGE} has {count} tables that begin with {HEAD.partition(chr(10))[0]}"
    return made


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
