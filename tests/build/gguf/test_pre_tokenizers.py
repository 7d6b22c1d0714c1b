"""A .gguf file's vocabulary gives the ids of the tokenizer.json that it was made from.

RELEASED has what those files say, word for word, of how text is cut and composed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from enginehouse.build.gguf.file import read_gguf
from enginehouse.build.gguf.pre_tokenizers import PRE_TOKENIZERS
from enginehouse.build.gguf.tokenizer import build_tokenizer
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from makers.engines import write_tiny_checkpoint
from makers.gguf_writer import write_gguf

Json = dict[str, Any]
NFC: Json = {"type": "NFC"}
GPT_2: Json = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS: Json = {"type": "Digits", "individual_digits": True}


def in_turn(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(*patterns: str | Json) -> Json:
    """Splits, each by what its pattern finds, and then bytes as letters."""
    steps: list[Json] = [
        {
            "type": "Split",
            "pattern": {"Regex": each},
            "behavior": "Isolated",
            "invert": False,
        }
        if isinstance(each, str)
        else each
        for each in patterns
    ]
    return in_turn(*steps, {**GPT_2, "use_regex": False})


LLAMA_3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS)
# tokenizer.ggml.pre: pre_tokenizer, normalizer and the model's ignore_merges.
RELEASED: dict[str, tuple[Json, Json | None, bool]] = {
    "gpt-2": (GPT_2, None, False),
    "default": (GPT_2, None, False),
    "olmo": (GPT_2, None, False),
    "exaone4": (GPT_2, None, False),
    "mpt": (GPT_2, NFC, False),
    "refact": (in_turn(DIGITS, GPT_2), None, False),
    "smollm": (in_turn(DIGITS, GPT_2), None, False),
    "starcoder": (in_turn(DIGITS, GPT_2), None, False),
    "command-r": (in_turn(DIGITS, GPT_2), NFC, False),
    "llama-bpe": (LLAMA_3, None, True),
    "llama3": (LLAMA_3, None, True),
    "llama-v3": (LLAMA_3, None, True),
    "smaug-bpe": (LLAMA_3, None, True),
    "dbrx": (LLAMA_3, None, False),
    "gpt-4o": (split(O200K), None, False),
    "tiny_aya": (split(r"\d{1,3}(?=(?:\d{3})*\b)", O200K), None, False),
    "qwen2": (QWEN_2, NFC, False),
    "deepseek-r1-qwen": (QWEN_2, NFC, False),
    "megrez": (QWEN_2, NFC, False),
    "stablelm2": (QWEN_2, None, False),
    "seed-coder": (SEED_CODER, None, False),
    "deepseek-coder": (DEEPSEEK_CODER, None, False),
    "tekken": (TEKKEN, None, True),
}
CORPUS = (
    "It's 12345 cafés!!\n\n x",
    "I've been 'told he's there, 'RE you sure? WE'LL see, don't WE'D; iPhone HTTPServer",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 1,000,000 10:45 v2.0 ١٢٣ ½² Ⅷ 1234567 apples",
    "cafe\u0301 A\u030angstro\u0308m ﬁne \u1e9b\u0323 한국어 \u1112\u1161\u11ab",
    "工作1314151天～ нещо на Български",
    "def f(x):\n\treturn x ** 2 + 10_000  # n\n\n\n   if a != b:\r\n        pass  \r\n/a/to//x\n/",
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 ------======= ''''''```````\"\"\"\"......!!!!!!??????",
    " \n \n\n \t \t\t \n  leading\u00a0and\u2003wide   spaces   \n",
    "",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    """Of its vocabulary the last word is one that no merge makes."""
    path = tmp_path_factory.mktemp("original") / "tiny"
    write_tiny_checkpoint(path, hidden=64, heads=2, kv_heads=2, layers=1)
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return open_checkpoint(path)


@pytest.fixture(scope="module", params=RELEASED)
def pair(
    original: SourceCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[Tokenizer, Tokenizer]:
    """Of a name what the file gives, and what the released file says."""
    name: str = request.param
    file = read_gguf(write_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf", original, pre=name))
    spec = json.loads((original.path / "tokenizer.json").read_text())
    spec["pre_tokenizer"], spec["normalizer"], whole = RELEASED[name]
    spec["model"]["ignore_merges"] = whole
    spec["post_processor"] = None
    return build_tokenizer(file), Tokenizer.from_str(json.dumps(spec))


def test_every_name_is_held_to_a_released_file() -> None:
    assert set(PRE_TOKENIZERS) == set(RELEASED)


def test_ids_and_cuts_are_those_of_the_released_tokenizer(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    ours, theirs = pair
    last = ours.decode([ours.get_vocab_size() - 1])
    assert last.strip().isalpha()
    for text in (*CORPUS, last):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids, text
        assert cuts(ours, text) == cuts(theirs, text)


@given(text=st.text(st.sampled_from("aZé한工\u0301'sl 12\t\n\r./_~🙂٣"), max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_text_is_cut_as_the_released_tokenizer_cuts_it(
    pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    ours, theirs = pair
    assert cuts(ours, text) == cuts(theirs, text)


def cuts(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.pre_tokenizer is not None
    found: list[tuple[str, tuple[int, int]]] = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return found


@pytest.mark.parametrize(("name", "begins"), [("tekken", True), ("smaug-bpe", False)])
def test_whether_a_text_begins_with_bos_is_the_keys_or_the_names(
    original: SourceCheckpoint, tmp_path: Path, name: str, begins: bool
) -> None:
    def begun(path: Path) -> bool:
        return build_tokenizer(read_gguf(path)).encode("a").ids[0] == 1

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(not begins)

    assert begun(write_gguf(tmp_path / "x.gguf", original, pre=name)) == begins
    assert begun(write_gguf(tmp_path / "y.gguf", original, pre=name, edit=edit)) != begins
