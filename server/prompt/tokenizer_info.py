"""What a client must know of the tokenizer to prepare prompts by itself: vLLM's /tokenizer_info.

The fields of tokenizer_config.json, with each token as its text. Knows no HTTP and no engine.
Source: vLLM's `--enable-tokenizer-info-endpoint`, and what lm-evaluation-harness reads of it.
"""

from __future__ import annotations

from typing import Any

from enginehouse.server.prompt.chat import Chat

_OF_ITS_FOLDER = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path", "auto_map")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # null where there is none


def tokenizer_info(chat: Chat, max_seq_len: int | None) -> dict[str, Any]:
    """max_seq_len: the engine's context, which is what texts have to fit; None: not known yet."""
    config = {
        name: _as_text(value)
        for name, value in chat.tokenizer_config.items()
        if name not in _OF_ITS_FOLDER
    }
    template = None if chat.template is None else chat.template.source
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(_TOKENS),
        **config,
        "chat_template": template,
        "model_max_length": max_seq_len,
    }


def _as_text(value: Any) -> Any:
    """The same, where tokens with their flags are their text."""
    if isinstance(value, dict):
        if isinstance(content := value.get("content"), str):
            return content
        return {key: _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list) else value
