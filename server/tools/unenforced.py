"""What of a request's schemas is enforced while it is generated, and the rest, judged at the end.

A schema that is strict is enforced whole or refused. Of another what can be is; the rest is named
in a header, and the answer is held against the schema when it is there. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from enginehouse.runtime.grammar.json_schema import exact_schema
from enginehouse.runtime.grammar.support import SchemaError
from enginehouse.runtime.schemas.effort import TooMuch
from enginehouse.runtime.schemas.plain import Plain, plain_schema
from enginehouse.server.tools.verdict import verdict_of


class Unenforced(NamedTuple):
    """paths: what of the schema is not enforced. schema None: where it holds is not known.

    function: whose arguments it is of; None: of the answer's text.
    """

    paths: tuple[str, ...]
    schema: Mapping[str, Any] | None = None
    function: str | None = None

    def verdict(self, text: str) -> str:
        """Of a text that was generated: valid or invalid by the schema, or unknown."""
        return "unknown" if self.schema is None else verdict_of(self.schema, text)


def plain_of(schema: Mapping[str, Any], strict: bool) -> Plain:
    """SchemaError for what is no schema, or when strict cannot be enforced whole."""
    plain, error = _plain(msgspec.json.encode(schema), strict)
    if plain is None:
        raise SchemaError(error)
    return plain


@lru_cache(256)
def _plain(text: bytes, strict: bool) -> tuple[Plain | None, str]:
    try:
        plain = plain_schema(msgspec.json.decode(text), strict)
        exact_schema(plain.schema)
    except SchemaError as error:
        if isinstance(error, TooMuch):  # of what stood before it, perhaps: nothing to remember
            raise
        return None, str(error)
    except RecursionError:
        return None, "the schema is nested too deep; make it flatter"
    return plain, ""


def unenforced(
    schema: Mapping[str, Any], plain: Plain, param: str, function: str | None = None
) -> tuple[Unenforced, ...]:
    """None or one; param: the request's field that the schema is."""
    if not plain.left_out:
        return ()
    paths = tuple(param + path.removeprefix("schema") for path in plain.left_out)
    return (Unenforced(paths, schema, function),)
