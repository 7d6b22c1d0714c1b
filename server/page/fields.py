"""The fields of a chat request as the page's form has them, taken from the OpenAPI document.

So a range, a default or a line of explanation is what validates, and is written once.
"""

from __future__ import annotations

from typing import Any

# What a person sets with a box, in the order of the product page; then what others added. Tools and
# the form of the answer have editors of their own.
MAIN = (
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "max_tokens",
    "stop",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "user",
)
MORE = (
    "logprobs",
    "top_logprobs",
    "reasoning_effort",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "parallel_tool_calls",
    "include_reasoning",
    "priority",
)
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum")


def form_fields(document: dict[str, Any]) -> list[dict[str, Any]]:
    """document: OpenAPI's. Each field's name, kind, bounds, default, and what it does."""
    properties = document["components"]["schemas"]["ChatBody"]["properties"]
    return [_field(name, properties[name], is_main=name in MAIN) for name in (*MAIN, *MORE)]


def _field(name: str, schema: dict[str, Any], is_main: bool) -> dict[str, Any]:
    forms = [form for form in schema["anyOf"] if form["type"] != "null"]
    form = forms[-1]  # of `stop` the list, which says how many there may be
    field = {
        "name": name,
        "kind": "list" if form["type"] == "array" else form["type"],
        "main": is_main,
        "about": schema["description"],
        "default": schema.get("default"),
    }
    if "maxItems" in form:
        field["most"] = form["maxItems"]
    return field | {bound: form[bound] for bound in _BOUNDS if bound in form}
