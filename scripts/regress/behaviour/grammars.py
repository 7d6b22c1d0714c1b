"""Cases: answers that a schema or a grammar rules, asked by prompts that do not speak of it.

Every form ends by itself within the tokens that are given, whatever the model would like to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from jsonschema import Draft202012Validator

from enginehouse.regress.behaviour.answers import Choice
from enginehouse.regress.behaviour.asker import Asker, bias, want

CHARACTERS = "na\u00efve \u4f60\u597d \U0001f642 \u00e7a"
_TOKENS = 160
_TRAIN = {
    "type": "object",
    "properties": {
        "line": {"enum": ["harbour", "hills"]},
        "coaches": {"type": "integer", "minimum": 1, "maximum": 12},
        "late": {"type": "boolean"},
    },
    "required": ["line", "coaches", "late"],
    "additionalProperties": False,
}
_LIST = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[a-z]{1,6}$"},
    "minItems": 2,
    "maxItems": 3,
}
_NESTED = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"},
        "stop": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/stop"}]},
    },
    "required": ["at", "stop"],
    "additionalProperties": False,
    "$defs": {
        "stop": {
            "type": "object",
            "properties": {"platform": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["platform"],
            "additionalProperties": False,
        }
    },
}
_SCHEMAS = {"train": _TRAIN, "list": _LIST, "nested": _NESTED}
_REGEX = "[a-c]{3}-[0-9]{2}"
_GRAMMAR = 'root ::= ("up" | "down") " " [0-9]'
_GRAMMAR_AS_REGEX = "(up|down) [0-9]"
_TAGGED = "<n>(1[0-2]|[1-9])</n>"
_NUMBER = {"type": "integer", "minimum": 1, "maximum": 12}
_TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<n>",
        "content": {"type": "json_schema", "json_schema": _NUMBER},
        "end": "</n>",
    },
}


def json_schema(asker: Asker) -> None:
    """Several schemas, each named and strict."""
    for name, schema in _SCHEMAS.items():
        form = {"name": name, "description": "A form.", "schema": schema, "strict": True}
        wanted = {"type": "json_schema", "json_schema": form}
        _check_json(_generated(asker, response_format=wanted), schema)


def json_object(asker: Asker) -> None:
    """JSON without a schema, and with one beside it."""
    # The model is drawn to the end of the object, as free JSON may go on for ever.
    closing = bias({asker.ids("}", add_special_tokens=False)[-1]: 100})
    found = _generated(asker, response_format={"type": "json_object"}, **closing)
    _check_json(found, {"type": "object"})
    wanted = {"type": "json_object", "schema": _TRAIN}
    if asker.known.is_ours:
        _check_json(_generated(asker, response_format=wanted), _TRAIN)


def structured_outputs(asker: Asker) -> None:
    """vLLM's name, with each of its kinds."""
    closing = bias({asker.ids("}", add_special_tokens=False)[-1]: 100})
    _check_json(_generated(asker, structured_outputs={"json": _TRAIN}), _TRAIN)
    _check_json(_generated(asker, structured_outputs={"json": json.dumps(_LIST)}), _LIST)
    found = _generated(asker, structured_outputs={"json_object": True}, **closing)
    _check_json(found, {"type": "object"})
    _check_text(_generated(asker, structured_outputs={"regex": _REGEX}), _REGEX)
    _check_choice(_generated(asker, structured_outputs={"choice": ["up", "down"]}))
    _check_text(_generated(asker, structured_outputs={"grammar": _GRAMMAR}), _GRAMMAR_AS_REGEX)
    _check_text(_generated(asker, structured_outputs={"structural_tag": _TAG}), _TAGGED)


def guided_fields(asker: Asker) -> None:
    """vLLM's older names, and SGLang's."""
    _check_json(_generated(asker, guided_json=_TRAIN), _TRAIN)
    _check_text(_generated(asker, guided_regex=_REGEX), _REGEX)
    _check_text(_generated(asker, guided_grammar=_GRAMMAR), _GRAMMAR_AS_REGEX)
    _check_choice(_generated(asker, guided_choice=["up", "down"]))
    _check_text(_generated(asker, regex=_REGEX), _REGEX)
    _check_text(_generated(asker, ebnf=_GRAMMAR), _GRAMMAR_AS_REGEX)


def structural_tag(asker: Asker) -> None:
    """Both of xgrammar's forms; the older one rules only what follows its trigger."""
    _check_text(_generated(asker, response_format=_TAG), _TAGGED)
    older = {
        "type": "structural_tag",
        "structures": [{"begin": "<n>", "schema": _NUMBER, "end": "</n>"}],
        "triggers": ["<n>"],
    }
    found = asker.chat(response_format=older, max_tokens=24)
    for rest in found.text.split("<n>")[1:]:
        number = rest.partition("</n>")[0]
        want(not number or number in map(str, range(1, 13)), f"found {rest!r} behind its trigger")


def completions_too(asker: Asker) -> None:
    """What rules a chat's answer rules a completion's."""
    found = asker.text("Once", structured_outputs={"regex": _REGEX}, max_tokens=_TOKENS)
    _check_text(found, _REGEX)
    wanted = {"type": "json_schema", "json_schema": {"name": "list", "schema": _LIST}}
    _check_json(asker.text("Once", response_format=wanted, max_tokens=_TOKENS), _LIST)


def _generated(asker: Asker, **fields: Any) -> Choice:
    return asker.ruled("Tell me about the sea.", max_tokens=_TOKENS, **fields)


def _check_json(found: Choice, schema: dict[str, Any]) -> None:
    said = f"an answer that a schema rules: found {found.text[:80]!r}"
    want(found.finish_reason == "stop", f"{said}, cut by {found.finish_reason}; wanted its end")
    try:
        value = json.loads(found.text)
    except ValueError:
        value = None
    want(value is not None, f"{said}; wanted JSON")
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(value)]
    want(not errors, f"{said}; its schema says: {'; '.join(errors[:1])}")


def _check_text(found: Choice, pattern: str) -> None:
    told = f"found {found.text[:80]!r}, which ends with {found.finish_reason}"
    whole = re.fullmatch(pattern, found.text) is not None
    want(whole and found.finish_reason == "stop", f"{told}; wanted {pattern} and stop")


def _check_choice(found: Choice, choices: Iterable[str] = ("up", "down")) -> None:
    want(found.text in choices, f"found {found.text[:80]!r}; wanted one of {', '.join(choices)}")


CASES = {
    "json_schema": json_schema,
    "json_object": json_object,
    "structured_outputs": structured_outputs,
    "guided_fields": guided_fields,
    "structural_tag": structural_tag,
    "completion_grammars": completions_too,
}
