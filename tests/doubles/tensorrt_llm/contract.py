"""Classes made of the contract's field lists: nothing that is not written there is accepted."""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).parents[2] / "contract"
SIGNATURES = json.loads((CONTRACT / "signatures.json").read_text(encoding="utf-8"))
CLASSES = SIGNATURES["classes"]
_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict}


def make_enum(name: str, values: list[str]) -> type[enum.Enum]:
    return enum.Enum(name, {value: value for value in values}, type=str)


ENUMS = {
    name: make_enum(name, values) for name, values in CLASSES["SchedulerConfig"]["enums"].items()
}


def accepts(type_text: str, value: Any) -> bool:
    """Whether a value is of one of the contract's types, such as `list[int]|None`."""
    for part in type_text.split("|"):
        part = part.strip()
        listed = re.fullmatch(r"list\[(\w+)\]", part)
        if part == "None":
            found = value is None
        elif listed:
            kind = _TYPES.get(listed[1], object)
            found = isinstance(value, list) and all(isinstance(item, kind) for item in value)
            found = found and not any(isinstance(item, bool) for item in value)
        elif part.startswith("'"):
            found = value == part.strip("'")
        elif part in _TYPES:
            found = isinstance(value, _TYPES[part])
            found = found and (part == "bool" or not isinstance(value, bool))
        elif part in ENUMS:
            found = isinstance(value, ENUMS[part])
        else:  # a class: by its name
            found = part in {base.__name__ for base in type(value).__mro__}
        if found:
            return True
    return False


class Fields:
    """Keyword-only fields with the contract's names, types and defaults.

    unknown: the exception TensorRT-LLM's kind of class raises for a name it has not.
    """

    title: str
    unknown: type[Exception] = TypeError

    def __init__(self, **given: Any) -> None:
        fields = CLASSES[self.title]["fields"]
        for name in given:
            if name not in fields:
                raise self.unknown(f"{self.title} got an unexpected argument {name!r}")
        for name, entry in fields.items():
            if name in given and not accepts(entry["type"], given[name]):
                raise self.unknown(f"{self.title}.{name}={given[name]!r} is no {entry['type']}")
            setattr(self, name, given.get(name, entry.get("default")))
        self.given = given
        self.validate()

    def validate(self) -> None:
        """What the class checks by itself."""
