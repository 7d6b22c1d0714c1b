"""What a `$ref` points to: JSON pointers with escapes and indices, anchors, the schema's own `$id`.

Source: RFC 6901, section 4 and 6; JSON Schema core 2020-12, section 8.2.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from enginehouse.runtime.grammar.support import SchemaError


class Remote(SchemaError):
    """A reference to another document, which is never fetched."""


class References:
    """Of one schema, its root."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._anchors: dict[str, Any] = {}
        self._read_anchors(root)

    def target(self, value: Any, where: str) -> Any:
        """The schema that it points to; SchemaError names what is not there."""
        if not isinstance(value, str):
            raise SchemaError(
                f"{where} is {str(value)[:60]!r}; wanted a text such as '#/$defs/name'"
            )
        document, _, fragment = value.partition("#")
        own = self._root.get("$id", self._root.get("id")) if isinstance(self._root, dict) else None
        if document and document != str(own).partition("#")[0]:
            if value in self._anchors:
                return self._anchors[value]
            raise Remote(
                f"{where} is {value[:60]!r}; wanted a reference into the schema itself, "
                "such as '#/$defs/name'"
            )
        if fragment and not fragment.startswith("/"):
            if unquote(fragment) not in self._anchors:
                raise SchemaError(f"{where} is {value[:60]!r}, and no $anchor has that name")
            return self._anchors[unquote(fragment)]
        target = self._root
        for part in unquote(fragment).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                raise SchemaError(f"{where} points to {value[:60]!r}, which is not in the schema")
        return target

    def _read_anchors(self, root: Any) -> None:
        waiting = [root]
        while waiting:
            item = waiting.pop()
            if isinstance(item, list):
                waiting += item
            elif isinstance(item, dict):
                for key in ("$anchor", "$dynamicAnchor"):
                    if isinstance(item.get(key), str):
                        self._anchors.setdefault(item[key], item)
                for key in ("$id", "id"):  # before 2019-09 an anchor is an id such as "#name"
                    if isinstance(name := item.get(key), str) and item is not root:
                        self._anchors.setdefault(name.removeprefix("#"), item)
                waiting += [child for key, child in item.items() if key not in ("enum", "const")]
