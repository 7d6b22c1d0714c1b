"""Which format a model's calls have: as it is named, or as the chat template shows it.

The formats have a file each, beside this one. This file does not know HTTP, the tokenizer or how
calls are read.
"""

from __future__ import annotations

from collections.abc import Callable

from enginehouse.server.formats.command import Command
from enginehouse.server.formats.glm4 import Glm4
from enginehouse.server.formats.harmony import Harmony
from enginehouse.server.formats.hermes import Granite, Hermes, Nemotron, Phi4Mini
from enginehouse.server.formats.hunyuan import hunyuan_of
from enginehouse.server.formats.lfm2 import Lfm2
from enginehouse.server.formats.llama import GenericJson, LlamaJson
from enginehouse.server.formats.mistral import mistral_of
from enginehouse.server.formats.pythonic import Pythonic
from enginehouse.server.formats.token_marked import DeepSeekV3, DeepSeekV31, KimiK2
from enginehouse.server.formats.xml import Glm45, MiniMaxM2, Qwen3Coder, SeedOss
from enginehouse.server.tools.format import Format

TOOL_FORMATS = (
    *("auto", "none", "llama3_json", "llama_pythonic", "hermes", "nemotron", "mistral", "json"),
    *("qwen3_coder", "harmony", "deepseek_v3", "deepseek_v31", "glm45", "kimi_k2", "granite"),
    *("command", "minimax_m2", "seed_oss", "phi4_mini", "glm4", "lfm2", "hunyuan"),
)
_PLAIN: dict[str, Callable[[], Format]] = {
    form.name: form
    for form in (
        *(LlamaJson, Pythonic, Lfm2, Hermes, Nemotron, Granite, Phi4Mini, Command, GenericJson),
        *(Qwen3Coder, SeedOss, MiniMaxM2, Glm45, Glm4, Harmony, DeepSeekV3, DeepSeekV31, KimiK2),
    )
}

# Texts of a chat template that only templates of one format have; the first that fits counts.
_MARKS = (
    ("harmony", ("<|channel|>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("glm45", ("<arg_key>",)),
    ("glm4", ("<|observation|>",)),
    ("qwen3_coder", ("<function=",)),
    ("hunyuan", ("<tool_calls>",)),
    ("hermes", ("<tool_call>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("mistral", ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("lfm2", ("<|tool_call_start|>", "<|tool_list_start|>")),
    ("command", ("<|START_ACTION|>",)),
    ("phi4_mini", ("<|/tool_call|>", "<|/tool|>")),
    ("granite", ("<|tool_call|>",)),
    ("llama_pythonic", ("<|python_start|>", "[func_name1(", "[func_name(")),
    ("llama3_json", ("<|python_tag|>", '"parameters": dictionary of argument name')),
)


def choose_format(template: str | None, wanted: str = "auto") -> Format | None:
    """The format that `wanted` names, or for auto the one the chat template shows; None for none.

    A template that shows no format has its calls in the generic one.
    """
    shown = template or ""
    name = wanted
    if wanted == "auto":
        marked = (name for name, marks in _MARKS if any(mark in shown for mark in marks))
        name = next(marked, "json")
    if name == "none":
        return None
    if name == "mistral":
        return mistral_of(shown)
    if name == "hunyuan":
        return hunyuan_of(shown)
    if name == "deepseek":  # R1 and V3 write arguments as a block
        name = "deepseek_v3" if "```json" in shown else "deepseek_v31"
    if name not in _PLAIN:
        raise ValueError(f"{name!r} is no format of tool calls")
    return _PLAIN[name]()
