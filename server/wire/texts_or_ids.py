"""A field that holds texts or token ids, one or several, in OpenAI's four forms.

Read, it is a list of texts, or of lists of ids. Knows no endpoint and no vocabulary.
Source: OpenAI's API reference, `prompt` of completions and `input` of embeddings.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from enginehouse.server.wire.json_body import found_text
from enginehouse.server.wire.refusal import refuse
from enginehouse.server.wire.shapes import Token

_Ids = Annotated[list[Token], Field(min_length=1)]


def texts_or_ids(most: int) -> BeforeValidator:
    """What reads the field, of at most so many texts or lists."""
    texts = Annotated[list[str], Field(min_length=1, max_length=most)]
    lists = Annotated[list[_Ids], Field(min_length=1, max_length=most)]
    form = str | texts | _Ids | lists
    return BeforeValidator(partial(_read, most), json_schema_input_type=form)


def check_sizes(data: dict[str, Any], field: str, max_seq_len: int | None) -> None:
    """Refuses a prompt of too many ids before each is looked at."""
    given = data.get(field)
    if max_seq_len is None or not isinstance(given, list):
        return
    holds_several = any(isinstance(item, (str, list)) for item in given[:1])
    lists = [item for item in given if isinstance(item, list)] if holds_several else [given]
    longest = max(map(len, lists), default=0)
    if longest > max_seq_len:
        refuse(
            field,
            f"the {field} is too long: found a list of {longest} items, and this model's maximum "
            f"context length is {max_seq_len} tokens",
            "context_length_exceeded",
        )


def _read(most: int, value: object) -> object:
    """ "at" says where a wrong one stands."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _bad("", value)
    if all(type(item) is int for item in value):
        return [_ids(value, "")]
    if len(value) > most:
        raise PydanticCustomError(
            "prompts",
            "found {num} texts or lists of ids; wanted at most {most}",
            {"num": len(value), "most": most},
        )
    kind = type(value[0])
    for index, item in enumerate(value):
        if type(item) is not kind or kind not in (str, list):
            raise _bad(f"[{index}]", item)
        if isinstance(item, list):
            _ids(item, f"[{index}]")
    return value


def _ids(value: list[Any], at: str) -> list[Any]:
    if not value:
        raise _bad(at, value)
    for index, item in enumerate(value):
        if type(item) is not int or not 0 <= item < 2**31:
            raise PydanticCustomError(
                "prompt",
                "{found} is no token id; wanted a number of the vocabulary",
                {"at": f"{at}[{index}]", "found": found_text(item)},
            )
    return value


def _bad(at: str, value: object) -> PydanticCustomError:
    return PydanticCustomError(
        "prompt",
        "found {found}; wanted a string, a list of strings, a list of token ids, or a list of such "
        "lists, none of them empty",
        {"at": at, "found": "an empty list" if value == [] else found_text(value)},
    )
