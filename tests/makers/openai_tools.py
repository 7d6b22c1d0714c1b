"""Tools as OpenAI's client names them, and its chunks put together."""

from __future__ import annotations

from typing import Any

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "unit": {"enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def joined(chunks: Any, num: int = 1) -> list[tuple[str, list[tuple[str, str]], str, list[Any]]]:
    """Of each choice: content, calls, finish_reason, logprobs; the order of deltas is checked."""
    texts, reasons = [""] * num, [""] * num
    calls: list[list[list[str]]] = [[] for _ in range(num)]
    logprobs: list[list[Any]] = [[] for _ in range(num)]
    for chunk in chunks:
        for choice in chunk.choices:
            index = choice.index
            assert not reasons[index], "a delta came after the last"
            texts[index] += choice.delta.content or ""
            reasons[index] = choice.finish_reason or ""
            logprobs[index] += choice.logprobs.content if choice.logprobs else []
            for delta in choice.delta.tool_calls or []:
                if delta.index == len(calls[index]):
                    assert delta.id and delta.id.startswith("call_") and delta.type == "function"
                    assert delta.function.arguments == ""
                    calls[index].append([delta.function.name, ""])
                else:
                    assert (delta.index, delta.id) == (len(calls[index]) - 1, None)
                    assert delta.function.name is None
                    calls[index][-1][1] += delta.function.arguments
    told = [[(name, arguments) for name, arguments in found] for found in calls]
    return list(zip(texts, told, reasons, logprobs, strict=True))
