"""Every kind of request, by a function that takes and gives what OpenAI's does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from asked import (
    MAX_TOKENS,
    NAMED,
    QUESTION,
    RESPONSE_FORMAT,
    RESULT,
    WEATHER,
    WEATHER_QUESTION,
    check_arguments,
    check_city,
    say,
    say_stream,
)

MESSAGES = [{"role": "user", "content": QUESTION}]


def ask_as_openai(create: Callable[..., Any], common: dict[str, Any]) -> None:
    """A plain answer, a stream, tools in two turns by each choice, JSON of a schema."""
    short = {**common, "max_tokens": MAX_TOKENS, "temperature": 0}
    answer = create(**short, messages=MESSAGES)
    plain = answer.choices[0].message.content
    say("plain", plain)
    say("", f"finish_reason={answer.choices[0].finish_reason} tokens={answer.usage.total_tokens}")
    chunks = list(
        create(**short, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    say_stream(pieces, plain)
    for choice in ("required", NAMED, "auto"):
        for stream in (False, True):
            _two_turns(create, short, choice, stream)
    answer = create(**short, messages=MESSAGES, response_format=RESPONSE_FORMAT)
    say("json_schema", answer.choices[0].message.content)
    check_city(json.loads(answer.choices[0].message.content))


def _two_turns(create: Callable[..., Any], short: Any, choice: Any, stream: bool) -> None:
    """Ask, answer each call, ask again."""
    asked: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
    name = choice if isinstance(choice, str) else "named"
    title = f"tools {name}{' streamed' if stream else ''}"
    fields = {**short, "tools": [WEATHER], "tool_choice": choice, "messages": asked}
    message, reason = _message(create, fields, stream)
    calls = message.get("tool_calls") or []
    for call in calls:
        say(title, f"{call['function']['name']}({call['function']['arguments']}) {call['id']}")
        if reason != "length":
            check_arguments(call["function"]["name"], call["function"]["arguments"])
    if not calls:
        say(title, message["content"])
        assert choice == "auto", "no call was made"
        return
    assert reason == "tool_calls", reason
    asked.append(message)
    asked += [{"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in calls]
    answer, reason = _message(create, {**fields, "tool_choice": "none"}, stream)
    say("  and then", f"{answer['content']} ({reason})")
    assert answer["content"] and not answer.get("tool_calls")


def _message(create: Callable[..., Any], fields: Any, stream: bool) -> tuple[dict[str, Any], str]:
    """The assistant's message as it is sent back, and how it ended."""
    if not stream:
        choice = create(**fields).choices[0]
        message = choice.message.model_dump(include={"role", "content", "tool_calls"})
        return message, choice.finish_reason
    content, reason, calls = "", "", []
    for chunk in create(**fields, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(calls):
                    function = {"name": delta.function.name, "arguments": ""}
                    calls.append({"id": delta.id, "type": delta.type, "function": function})
                calls[delta.index]["function"]["arguments"] += delta.function.arguments or ""
    message = {"role": "assistant", "content": content or None}
    return ({**message, "tool_calls": calls} if calls else message), reason
