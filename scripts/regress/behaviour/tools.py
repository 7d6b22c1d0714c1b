"""Cases: calls of tools, asked for, enforced and replayed.

Arguments are of closed schemas, so that any model ends them.
"""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator

from enginehouse.regress.behaviour.answers import Choice
from enginehouse.regress.behaviour.asker import Asker, NotAsked, want, want_equal
from enginehouse.regress.subject.api import CHAT

_DAYS = {"type": "integer", "minimum": 0, "maximum": 9}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "get_heat": {
        "type": "object",
        "properties": {"days": _DAYS, "unit": {"enum": ["C", "F"]}},
        "required": ["days", "unit"],
        "additionalProperties": False,
    },
    "get_wind": {
        "type": "object",
        "properties": {"days": _DAYS},
        "required": ["days"],
        "additionalProperties": False,
    },
}


def _tools(**more: Any) -> list[dict[str, Any]]:
    said = {"description": "Tells the weather.", **more}
    return [
        {"type": "function", "function": {"name": name, "parameters": schema, **said}}
        for name, schema in _SCHEMAS.items()
    ]


TOOLS = _tools()
_STRICT_TOOLS = _tools(strict=True)  # not every form of calls can promise it unless one is forced
_NAMED = {"type": "function", "function": {"name": "get_wind"}}
_RESULT = "17 degrees"


def skip_without_tools(asker: Asker) -> None:
    """An engine may be set to take none: it then refuses the field."""
    reply = asker.api.reply(CHAT, messages=_asked(), tools=TOOLS, max_tokens=1)
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    if reply.status == 400 and isinstance(error, dict) and error.get("param") == "tools":
        raise NotAsked(f"this engine takes no tools: {error.get('message')}")


def required_tools(asker: Asker) -> None:
    """One call at least, of the request's functions, its arguments by their schema."""
    skip_without_tools(asker)
    found = _call(asker, tool_choice="required", parallel_tool_calls=False)
    want_equal(len(found.calls), 1, "calls with tool_choice required, one at most")
    _check(found)
    several = _call(asker, tool_choice="required")
    want(bool(several.calls), "found no call with tool_choice required; wanted one at least")
    if several.finish_reason != "length":
        _check(several)


def named_tool(asker: Asker) -> None:
    """One call, of the function that is named."""
    skip_without_tools(asker)
    found = _call(asker, tool_choice=_NAMED)
    want_equal([name for name, _ in found.calls], ["get_wind"], "calls of a named function")
    _check(found)


def unforced_tools(asker: Asker) -> None:
    """none: no call; auto: as the model likes, but a call that is whole is one of the request's."""
    skip_without_tools(asker)
    silent = asker.chat(_asked(), tools=TOOLS, tool_choice="none")
    want_equal(silent.calls, [], "calls with tool_choice none")
    free = asker.chat(_asked(), tools=TOOLS, tool_choice="auto", max_tokens=24)
    if free.finish_reason == "tool_calls":
        _check(free)
    error = asker.refusal(CHAT, messages=_asked(), tools=TOOLS[:1] * 2)
    want_equal(error["param"], "tools[1].function.name", "param of a function that is there twice")


def tool_history(asker: Asker) -> None:
    """Calls and results of earlier turns reach the model, however a client spells them."""
    skip_without_tools(asker)
    arguments = {"days": 3}
    spelled: list[Any] = [json.dumps(arguments), arguments]
    prompts = [asker.prompt(_replayed(each), tools=TOOLS) for each in spelled]
    want(_RESULT in prompts[0], f"found the prompt {prompts[0][-200:]!r}; wanted {_RESULT!r} in it")
    want("get_wind" in prompts[0], "the call of an earlier turn is not in the prompt")
    want_equal(prompts[1], prompts[0], "the prompt of arguments as an object, beside as text")
    older = [
        *_asked(),
        {"role": "assistant", "function_call": {"name": "get_wind", "arguments": "{}"}},
        {"role": "function", "name": "get_wind", "content": _RESULT},
    ]
    want(_RESULT in asker.prompt(older), "the older form's result is not in the prompt")
    found = asker.chat(_replayed(""), tools=TOOLS, tool_choice="none", **asker.at_least(2))
    want(bool(found.said), "found no text behind a tool's result")
    broken = asker.granted(CHAT, messages=_replayed('{"days": '), tools=TOOLS, max_tokens=1)
    want("x-repaired-messages" in broken.headers, "X-Repaired-Messages is not there; wanted it")


def _asked() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "How is the weather?"}]


def _replayed(arguments: Any) -> list[dict[str, Any]]:
    call = {"name": "get_wind", "arguments": arguments}
    made = {"id": "call00001", "type": "function", "function": call}
    return [
        *_asked(),
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call00001", "content": _RESULT},
    ]


def _call(asker: Asker, **fields: Any) -> Choice:
    return asker.ruled(_asked(), tools=_STRICT_TOOLS, max_tokens=200, **fields)


def _check(found: Choice) -> None:
    want(
        found.finish_reason in ("tool_calls", "stop"), f"found {found.finish_reason} behind a call"
    )
    for name, text in found.calls:
        want(name in _SCHEMAS, f"found a call of {name!r}; wanted {' or '.join(_SCHEMAS)}")
        try:
            arguments = json.loads(text)
        except ValueError:
            arguments = None
        valid = Draft202012Validator(_SCHEMAS[name]).is_valid(arguments)
        want(valid, f"found the arguments {text!r} of {name}; wanted them by its schema")


CASES = {
    "tools_required": required_tools,
    "tools_named": named_tool,
    "tools_unforced": unforced_tools,
    "tool_history": tool_history,
}
