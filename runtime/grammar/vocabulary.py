"""The bytes that each token of an engine stands for, as grammars see them.

Special tokens and ids without a token are empty: no grammar ever allows them. Those that are part
of an answer, around a call of a tool or a thought, are as they are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

SHOWN_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<think>",
    "</think>",
    *("[THINK]", "[/THINK]", "<seed:think>", "</seed:think>"),
    *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"),
    *("<TOOLCALL>", "</TOOLCALL>", "<seed:tool_call>", "</seed:tool_call>"),
    *("<minimax:tool_call>", "</minimax:tool_call>", "<|tool_call|>", "<|/tool_call|>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
# Of GPT-OSS, whose answers are messages; elsewhere they end a turn.
_CHANNEL = "<|channel|>"
HARMONY_TOKENS = (_CHANNEL, "<|start|>", "<|message|>", "<|constrain|>", "<|end|>")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def read_vocabulary(engine_dir: Path, vocab_size: int) -> list[bytes] | None:
    """One entry for each of the model's vocab_size ids; None without a tokenizer.json."""
    path = engine_dir / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    kinds = decoder_kinds(tokenizer)
    byte_of = byte_level_alphabet() if "ByteLevel" in kinds else {}
    added = tokenizer.get_added_tokens_decoder()
    words = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * vocab_size
    shown = {*SHOWN_TOKENS, *(HARMONY_TOKENS if _CHANNEL in words else ())}
    for token, token_id in words.items():
        hidden = token_id in added and added[token_id].special and token not in shown
        if token_id >= vocab_size or hidden:
            continue
        if token_id in added:
            pieces[token_id] = token.encode()
        elif byte_of:
            pieces[token_id] = _byte_level(token, byte_of)
        elif match := BYTE_TOKEN.fullmatch(token):
            pieces[token_id] = bytes.fromhex(match[1])
        elif "WordPiece" in kinds:
            pieces[token_id] = (token[2:] if token.startswith("##") else f" {token}").encode()
        else:
            pieces[token_id] = token.replace("\u2581", " ").encode()
    return pieces


def decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """The types of the tokenizer's decoder and of the parts it is made of: ByteLevel, ..."""
    return set(_types_of(json.loads(tokenizer.to_str())["decoder"]))


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(256 + i): byte for i, byte in enumerate(shifted)},
    }


def _byte_level(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of[char] for char in token)
    except KeyError:
        return token.encode()


def _types_of(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders", []):
            yield from _types_of(part)
