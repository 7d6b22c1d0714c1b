"""The tokenizer in a .gguf file's metadata as Hugging Face's: tokenizer.json and what goes with it.

This file does not know tensors or the model's config.
Source: llama.cpp's llama-vocab.cpp and convert_hf_to_gguf.py, for how its keys are to be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from enginehouse.build.gguf.file import GgufFile
from enginehouse.build.gguf.pre_tokenizers import PRE_TOKENIZERS
from enginehouse.build.sources.tokenizer_files import end_of_turn_tokens
from enginehouse.runtime.errors import CheckpointError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

# Of Phi-3's marks, behind all others of which white space is dropped; no key says so.
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")

# What each key of the vocabulary holds: one of it, or a list of them.
_Kinds = tuple[type, ...]
_WORD: _Kinds = (str,)
_NUMBER: _Kinds = (int, float)
_SCALAR_KEYS = {
    "tokenizer.ggml.model": _WORD,
    "tokenizer.ggml.pre": _WORD,
    "tokenizer.chat_template": _WORD,
}
_LIST_KEYS = {
    "tokenizer.ggml.tokens": _WORD,
    "tokenizer.ggml.merges": _WORD,
    "tokenizer.ggml.scores": _NUMBER,
    "tokenizer.ggml.token_type": _NUMBER,
}


def check_vocabulary(file: GgufFile) -> None:
    """CheckpointError for a key of the tokenizer that holds something of another kind."""
    for key, value in file.metadata.items():
        scalar, items = _SCALAR_KEYS.get(key), _LIST_KEYS.get(key)
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            scalar = (int,)
        wrong = scalar is not None and not isinstance(value, scalar)
        if items is not None:
            wrong = not isinstance(value, list) or any(not isinstance(v, items) for v in value)
        if wrong:
            raise CheckpointError(
                f"{file.path} has {key} of another kind than a tokenizer's; download the file again"
            )


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The file's tokenizer: byte-level BPE ("gpt2") or sentencepiece BPE ("llama")."""
    metadata = file.metadata
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders or not tokens:
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.model {kind!r}; wanted gpt2 or llama: "
            "give the model's Hugging Face directory"
        )
    tokenizer = builders[kind](file, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    drops_space = kind == "llama" and metadata.get("general.architecture") == "phi3"
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=token_type != _USER_DEFINED,
                normalized=False,
                rstrip=drops_space and token not in _KEEP_SPACE,
            )
            for token, token_type in zip(tokens, types, strict=False)
            if token_type in added
        ]
    )
    bos = _token(file, "bos")
    usual = kind == "llama" or PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].begins
    if bos and metadata.get("tokenizer.ggml.add_bos_token", usual):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return tokenizer


def _token(file: GgufFile, role: str) -> str | None:
    number = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    tokens: list[str] = file.metadata.get("tokenizer.ggml.tokens") or []
    return tokens[number] if number is not None and number < len(tokens) else None


def _byte_level_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.pre {name!r}; wanted one of "
            f"{', '.join(PRE_TOKENIZERS)}: give the model's Hugging Face directory"
        )
    vocab = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for merge in file.metadata.get("tokenizer.ggml.merges") or []:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise CheckpointError(
                f"{file.path} merges {merge!r}, not in its vocabulary; download the file again"
            )
        merges.append((left, right))
    if not merges:
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.merges; download the file again")
    found = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=found.whole))
    if found.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = found.cut()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Pieces and scores become merges: every split of a piece into two, best score first."""
    scores = file.metadata.get("tokenizer.ggml.scores") or []
    vocab = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int, int, str, str]] = []
    for piece, score in zip(tokens, scores, strict=False):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                order = (-score, -len(left), -len(right), vocab[left], vocab[right])
                found.append((*order, left, right))
    merges = [(left, right) for *_, left, right in sorted(found)]
    unknown = _token(file, "unknown") or "<unk>"
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = "\u2581"
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(space)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", space)])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps
    )
    return tokenizer


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence or a turn, and those of the template's end-of-turn tokens."""
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    words = end_of_turn_tokens(metadata.get("tokenizer.chat_template"))
    ids += [tokens.index(word) for word in words if word in tokens]
    return tuple(dict.fromkeys(number for number in ids if number is not None))


def write_tokenizer(file: GgufFile, dest: Path) -> list[str]:
    """Write what a Hugging Face directory would hold beside its weights."""
    metadata = file.metadata
    template = metadata.get("tokenizer.chat_template")
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    words = {f"{role}_token": _token(file, name) for role, name in roles.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: word for key, word in words.items() if word is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.of_model("context_length"),
        **({"chat_template": template} if template else {}),
    }
    generation = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos_token_ids(metadata)),
    }
    texts = {
        "tokenizer.json": build_tokenizer(file).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **({"chat_template.jinja": template} if template else {}),
    }
    for name, text in texts.items():
        (dest / name).write_text(text, encoding="utf-8")
    return list(texts)
