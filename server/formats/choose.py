"""Which format a model's calls have: as it is named, or as the chat template shows it.

The formats have a file each, beside this one. This file does not know HTTP, the tokenizer or how
calls are read.
"""

from __future__ import annotations

from enginehouse.server.formats.hermes import Hermes, Nemotron
from enginehouse.server.formats.llama import GenericJson, LlamaJson
from enginehouse.server.formats.mistral import mistral_of
from enginehouse.server.formats.pythonic import Pythonic
from enginehouse.server.tools.format import Format

TOOL_FORMATS = (
    *("auto", "none", "llama3_json", "llama_pythonic", "hermes", "nemotron", "mistral", "json"),
)

# Texts of a chat template that only templates of one format have; the first that fits counts.
_MARKS = (
    ("hermes", ("<tool_call>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("mistral", ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    ("llama_pythonic", ("<|python_start|>", "[func_name1(", "[func_name(")),
    ("llama3_json", ("<|python_tag|>", '"parameters": dictionary of argument name')),
)


def choose_format(template: str | None, wanted: str = "auto") -> Format | None:
    """The format that `wanted` names, or for auto the one the chat template shows; None for none.

    A template that shows no format has its calls in the generic one.
    """
    name = wanted
    if wanted == "auto":
        marked = (name for name, marks in _MARKS if any(mark in (template or "") for mark in marks))
        name = next(marked, "json")
    match name:
        case "none":
            return None
        case "llama3_json":
            return LlamaJson()
        case "llama_pythonic":
            return Pythonic()
        case "hermes":
            return Hermes()
        case "nemotron":
            return Nemotron()
        case "mistral":
            return mistral_of(template or "")
        case "json":
            return GenericJson()
    raise ValueError(f"{wanted!r} is no format of tool calls")
