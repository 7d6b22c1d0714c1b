"""How a byte-level vocabulary of a .gguf file cuts text before byte pairs are merged.

The file says it by a name alone, `tokenizer.ggml.pre`. This file does not know GGUF.
Source: llama.cpp's llama-vocab.cpp for the names; the tokenizer.json of the models that it gives
them to, for what each does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import Regex
from tokenizers import pre_tokenizers as pre

_SHORT_FORM = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_NUMBER, _NUMBERS_OF_3 = r"\p{N}", r"\p{N}{1,3}"
_SIGNS, _SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_SHORT_FORM}|{_WORD}|{_NUMBERS_OF_3}|{_SIGNS}|{_SPACE}"
_QWEN2 = f"{_SHORT_FORM}|{_WORD}|{_NUMBER}|{_SIGNS}|{_SPACE}"
_SEED_CODER = rf"{_SHORT_FORM}|{_WORD}|{_NUMBER}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _PATHS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|{_NUMBER}|{_PATHS}|{_SPACE}"
_O200K = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT_FORM}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT_FORM}?|"
    f"{_NUMBERS_OF_3}|{_PATHS}|{_SPACE}"
)
_THOUSANDS = r"\d{1,3}(?=(?:\d{3})*\b)"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _NUMBER)


def _split(*patterns: str) -> pre.PreTokenizer:
    """What the first of the patterns finds, and within each piece the next."""
    splits = [pre.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre.PreTokenizer:
    return pre.ByteLevel(add_prefix_space=False)


def _digits_apart() -> pre.PreTokenizer:
    return pre.Sequence([pre.Digits(individual_digits=True), _gpt2()])


class PreTokenizer(NamedTuple):
    """composed: text is brought to NFC first. whole: a word in the vocabulary is not merged up to.
    begins: a text begins with the bos token, where no key says otherwise.
    """

    cut: Callable[[], pre.PreTokenizer]
    composed: bool = False
    whole: bool = False
    begins: bool = False


_LLAMA_BPE = PreTokenizer(lambda: _split(_LLAMA3), whole=True, begins=True)
_OF_QWEN2 = PreTokenizer(lambda: _split(_QWEN2), composed=True)
# tokenizer.ggml.pre -> what it says.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_gpt2),
    "default": PreTokenizer(_gpt2),
    "olmo": PreTokenizer(_gpt2),
    "exaone4": PreTokenizer(_gpt2),
    "mpt": PreTokenizer(_gpt2, composed=True),  # GPT-NeoX's, of StableLM 3B too
    "refact": PreTokenizer(_digits_apart),
    "smollm": PreTokenizer(_digits_apart),
    "command-r": PreTokenizer(_digits_apart, composed=True),
    "starcoder": PreTokenizer(_digits_apart),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "smaug-bpe": PreTokenizer(lambda: _split(_LLAMA3), whole=True),  # SmolLM3's
    "dbrx": PreTokenizer(lambda: _split(_LLAMA3)),
    "gpt-4o": PreTokenizer(lambda: _split(_O200K)),
    "tiny_aya": PreTokenizer(lambda: _split(_THOUSANDS, _O200K)),
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _OF_QWEN2,
    "megrez": _OF_QWEN2,
    "stablelm2": PreTokenizer(lambda: _split(_QWEN2)),
    "seed-coder": PreTokenizer(lambda: _split(_SEED_CODER)),
    "deepseek-coder": PreTokenizer(lambda: _split(*_DEEPSEEK_CODER)),
    "tekken": PreTokenizer(lambda: _split(_TEKKEN), whole=True, begins=True),
}
