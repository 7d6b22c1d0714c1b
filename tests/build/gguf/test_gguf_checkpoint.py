"""A .gguf file gives back the Hugging Face checkpoint that it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from enginehouse.build.families.shapes import check_tensors
from enginehouse.build.gguf.checkpoint import open_gguf
from enginehouse.build.gguf.file import GgufTensor, read_gguf, read_rows
from enginehouse.build.gguf.rope import llama3_frequency_factors
from enginehouse.build.gguf.tokenizer import build_tokenizer, check_vocabulary
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.errors import CheckpointError
from makers.engines import write_tiny_checkpoint
from makers.gguf_writer import Edit, write_gguf

TEXTS = [
    "What is the time? It's ten past seven: 12345 seats, 3.14 and 1,000,000.",
    "def f(x):\n\treturn x ** 2 + 10_000  # comment\n\n\n    if a != b:\r\n        pass  ",
    "naïve café — Привет, мир! 你好，世界 123 こんにちは ١٢٣ ½²",
    "🙂 family 👩‍👩‍👧‍👦 flag 🇫🇷 <|im_start|>user\nHi<|im_end|>\n",
    "   leading and trailing   ",
    "",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> SourceCheckpoint:
    path = tmp_path_factory.mktemp("original") / "tiny"
    return open_checkpoint(
        write_tiny_checkpoint(path, hidden=128, heads=4, kv_heads=2, attention_bias=True, layers=2)
    )


@pytest.fixture(scope="module")
def converted(
    original: SourceCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> SourceCheckpoint:
    return open_gguf(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", original))


def test_the_config_is_the_originals(
    original: SourceCheckpoint, converted: SourceCheckpoint
) -> None:
    assert {key: converted.config[key] for key in original.config} == original.config
    assert model_config(converted.config, "auto") == model_config(original.config, "auto")
    check_tensors(converted.tensors, model_config(converted.config, "auto"))
    assert (converted.name, converted.kind, converted.license) == ("tiny", "gguf", "apache-2.0")
    assert converted.bos_token_id == 1
    assert converted.eos_token_ids == (2,)


def test_every_tensor_is_the_originals(
    original: SourceCheckpoint, converted: SourceCheckpoint
) -> None:
    assert set(converted.tensors.infos) == set(original.tensors.infos)
    for name, info in converted.tensors.infos.items():
        found = converted.tensors.read(name)
        assert found.dtype == info.dtype == torch.float32 and found.shape == info.shape
        assert torch.equal(found, original.tensors.read(name).float()), name


@settings(max_examples=40, deadline=None)
@given(start=st.integers(-2, 130), stop=st.integers(-2, 130), short=st.sampled_from("qkv"))
def test_any_rows_equal_the_rows_of_the_whole(
    original: SourceCheckpoint, converted: SourceCheckpoint, start: int, stop: int, short: str
) -> None:
    for part in ("weight", "bias"):
        name = f"model.layers.1.self_attn.{short}_proj.{part}"
        wanted = original.tensors.read(name).float()[start:stop]
        assert torch.equal(converted.tensors.read(name, slice(start, stop)), wanted)


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")]
)
def test_blocks_are_dequantised_as_gguf_does(
    original: SourceCheckpoint, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    source = open_gguf(write_gguf(tmp_path / "x.gguf", original, kind))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        weight = original.tensors.read(name).float().numpy()
        wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))
        assert torch.equal(source.tensors.read(name), wanted)
        assert torch.equal(source.tensors.read(name, slice(3, 40)), wanted[3:40])


BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType[name] for name in BLOCKS])
def test_rows_of_every_block_format_are_those_of_the_whole(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read some at a time, wherever the rows lie; gguf's Python does not write these formats."""
    size, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    width, path = 512, tmp_path / "blocks"
    data = np.random.default_rng(3).integers(0, 64, (12, width // size * size_bytes), np.uint8)
    path.write_bytes(bytes(7) + data.tobytes())
    tensor = GgufTensor(kind, (3, 4, width), 7)
    monkeypatch.setattr("enginehouse.build.gguf.file._CHUNK_ELEMENTS", 2 * width)
    wanted = gguf.dequantize(data, kind)
    assert np.isfinite(wanted).all() and len(np.unique(wanted)) > 8
    for start, stop in ((0, 12), (5, 10), (11, 12), (4, 4)):
        assert np.array_equal(read_rows(path, "x", tensor, start, stop), wanted[start:stop])


def test_a_type_that_gguf_cannot_dequantise_is_refused(
    original: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_gguf(write_gguf(tmp_path / "x.gguf", original))

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(CheckpointError, match="holds model.norm.weight as F32, which cannot be"):
        source.tensors.read("model.norm.weight")


def test_the_header_equals_what_ggufs_own_reader_finds(converted: SourceCheckpoint) -> None:
    file, reader = read_gguf(converted.path), gguf.GGUFReader(converted.path)
    wanted = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == wanted
    for tensor in reader.tensors:
        found = file.tensors[tensor.name]
        assert found.offset == tensor.data_offset and found.kind == tensor.tensor_type
        assert found.shape == tuple(int(size) for size in tensor.shape[::-1])


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    tied = open_checkpoint(write_tiny_checkpoint(tmp_path / "tied", tied=True, layers=1))
    source = open_gguf(write_gguf(tmp_path / "tied.gguf", tied))
    assert source.config["tie_word_embeddings"] and "lm_head.weight" not in source.tensors.infos


def test_cut_anywhere_in_the_header_the_file_is_refused(
    converted: SourceCheckpoint, tmp_path: Path
) -> None:
    content = converted.path.read_bytes()
    first = min(tensor.offset for tensor in read_gguf(converted.path).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, first, 997), first + 5, len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"PK\x03\x04 a zip", "wanted b'GGUF': it is no GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(64), "is GGUF version 1; wanted 2 or 3"),
        (b"GGUF\0\0\0\x03" + bytes(64), "wanted 2 or 3, little-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 64, "truncated or damaged"),
    ],
)
def test_what_is_no_gguf_is_said_to_be_none(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=wanted):
        open_gguf(tmp_path / "x.gguf")


def add(key: str, value: Any) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        methods: dict[type, Callable[[str, Any], None]] = {
            str: writer.add_string,
            float: writer.add_float32,
            int: writer.add_uint32,
            bool: writer.add_bool,
        }
        methods[type(value)](key, value)

    return edit


def add_tensor(name: str, values: Any) -> Edit:
    return lambda writer: writer.add_tensor(name, np.asarray(values, dtype=np.float32))


def edits(**scaling: Any) -> Edit:
    """Keys of llama.rope.scaling."""

    def edit(writer: gguf.GGUFWriter) -> None:
        for key, value in scaling.items():
            add(f"llama.rope.scaling.{key}", value)(writer)

    return edit


LLAMA3_FACTORS = llama3_frequency_factors(32, 10000.0, 8.0, 8192)


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (add("llama.rope.scaling.type", "none"), None),
        (edits(type="none", factor=4.0), None),
        (edits(type="yarn"), None),
        (edits(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (edits(type="linear", factor=1.0, attn_factor=1.0), None),
        (
            edits(type="yarn", factor=4.0, original_context_length=64, finetuned=True),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            edits(type="yarn", factor=math.e**2, attn_factor=0.5, yarn_beta_fast=16.0),
            {
                "rope_type": "yarn",
                "factor": pytest.approx(math.e**2),
                "beta_fast": 16.0,
                "attention_factor": pytest.approx(0.6),
            },
        ),
        (add("llama.rope.scale_linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (add_tensor("rope_freqs.weight", np.ones(16)), None),
        (
            add_tensor("rope_freqs.weight", LLAMA3_FACTORS),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rope_scaling_is_recovered(
    original: SourceCheckpoint, tmp_path: Path, edit: Edit, wanted: dict[str, Any] | None
) -> None:
    source = open_gguf(write_gguf(tmp_path / "x.gguf", original, edit=edit))
    assert source.config["rope_scaling"] == wanted
    model_config(source.config, "auto")


NEUTRAL = {
    "attention.scale": 32**-0.5,
    "attention.causal": True,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 0.0,
    "expert_weights_scale": 0.0,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "attention.sliding_window": 0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def test_keys_that_change_nothing_are_passed_over(
    original: SourceCheckpoint, tmp_path: Path
) -> None:
    assert original.config["head_dim"] == 32

    def edit(writer: gguf.GGUFWriter) -> None:
        for key, value in NEUTRAL.items():
            add(f"llama.{key}", value)(writer)

    plain = open_gguf(write_gguf(tmp_path / "plain.gguf", original))
    assert open_gguf(write_gguf(tmp_path / "x.gguf", original, edit=edit)).config == plain.config


def test_llama3_factors_equal_llama_cpps_loop() -> None:
    wanted = []
    for power in range(0, 32, 2):
        wavelength = 2 * math.pi * 10000.0 ** (power / 32)
        if wavelength < 8192 / 4:
            wanted.append(1.0)
        elif wavelength > 8192:
            wanted.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            wanted.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert 1.0 < sorted(wanted)[len([x for x in wanted if x == 1.0])] < 8.0
    assert np.allclose(LLAMA3_FACTORS, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (add("llama.rope.scaling.type", "longrope"), "'longrope'; wanted none, linear or yarn"),
        (add_tensor("rope_freqs.weight", np.arange(1, 17)), "that no Llama 3.1 scaling gives"),
        (edits(attn_factor=1.2), "attn_factor=1.2 without yarn"),
        (edits(type="linear", factor=2.0, attn_factor=1.2), "attn_factor=1.2 without yarn"),
        (
            add("llama.attention.scale", 0.25),
            "llama.attention.scale=0.25, which no config.json of a llama can say",
        ),
        (add("llama.expert_weights_scale", 2.5), "llama.expert_weights_scale=2.5"),
        (add("llama.logit_scale", 8.0), "llama.logit_scale=8.0.*; wanted 1 or none"),
        (add("llama.embedding_scale", 12.0), "llama.embedding_scale=12.0"),
        (add("llama.residual_scale", 0.22), "llama.residual_scale=0.2"),
        (add("llama.final_logit_softcapping", 30.0), "llama.final_logit_softcapping=30.0"),
        (add("llama.attention.sliding_window", 16), "llama.attention.sliding_window=16"),
        (edits(type="yarn", factor=4.0, yarn_log_multiplier=0.1), "yarn_log_multiplier=0.1"),
        (add("llama.attention.key_length", 48), "attention.key_length=48"),
        (add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 2))), "a mixture of experts?"),
    ],
)
def test_what_a_llama_config_cannot_say_is_refused(
    original: SourceCheckpoint, tmp_path: Path, edit: Edit, wanted: str
) -> None:
    with pytest.raises(CheckpointError, match=wanted):
        open_gguf(write_gguf(tmp_path / "x.gguf", original, edit=edit))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", 5),
        ("tokenizer.ggml.tokens", 5),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.merges", "a b"),
        ("tokenizer.ggml.token_type", ["x"]),
        ("tokenizer.ggml.bos_token_id", "one"),
        ("tokenizer.ggml.eot_token_id", [1]),
        ("tokenizer.chat_template", 5),
    ],
)
def test_a_key_of_another_kind_is_refused_by_name(
    key: str, value: Any, converted: SourceCheckpoint
) -> None:
    file = read_gguf(converted.path)
    check_vocabulary(file)
    with pytest.raises(CheckpointError, match=f"has {key} of another kind"):
        check_vocabulary(file._replace(metadata={**file.metadata, key: value}))


def test_another_family_is_refused(original: SourceCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="architecture 'baichuan'.*only llama, granite"):
        open_gguf(write_gguf(tmp_path / "x.gguf", original, family="baichuan"))


def test_the_tokenizer_gives_the_originals_ids(
    original: SourceCheckpoint, converted: SourceCheckpoint, tmp_path: Path
) -> None:
    names = converted.write_tokenizer(tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    wanted = Tokenizer.from_file(str(original.path / "tokenizer.json"))
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert found.encode(text).ids == wanted.encode(text).ids
        assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text
    assert found.decode([1, 40, 2]) == wanted.decode([1, 40, 2])

    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (tmp_path / "chat_template.jinja").read_text() == config["chat_template"]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2]}


@pytest.mark.parametrize("name", [None, "unheard-of"])
def test_an_unknown_pre_tokenizer_is_refused_by_name(
    original: SourceCheckpoint, tmp_path: Path, name: str | None
) -> None:
    source = open_gguf(write_gguf(tmp_path / "x.gguf", original, pre=name))
    with pytest.raises(CheckpointError, match=f"pre {name!r}; wanted one of gpt-2, .*smollm, "):
        source.write_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("merges", "wanted"),
    [([], "has no tokenizer.ggml.merges"), (["zz y"], "merges 'zz y', not in its vocabulary")],
)
def test_merges_that_do_not_fit_are_refused(
    converted: SourceCheckpoint, merges: list[str], wanted: str
) -> None:
    file = read_gguf(converted.path)
    file.metadata["tokenizer.ggml.merges"] = merges
    with pytest.raises(CheckpointError, match=wanted):
        build_tokenizer(file)


def sentencepiece_ids(
    text: str, tokens: list[str], scores: list[float], prefixed: bool
) -> list[int]:
    """Sentencepiece's BPE, told naively: join the best-scored neighbours, leftmost first."""
    vocab = {token: number for number, token in enumerate(tokens)}
    pieces = list("\u2581" * prefixed + text.replace(" ", "\u2581"))
    while True:
        joined = [pieces[i] + pieces[i + 1] for i in range(len(pieces) - 1)]
        known = [(-scores[vocab[piece]], i) for i, piece in enumerate(joined) if piece in vocab]
        if not known:
            break
        at = min(known)[1]
        pieces[at : at + 2] = [joined[at]]
    ids = []
    for piece in pieces:
        raw = piece.encode()
        ids += [vocab[piece]] if piece in vocab else [vocab[f"<0x{byte:02X}>"] for byte in raw]
    return ids


@pytest.mark.parametrize("prefixed", [True, False], ids=["llama", "gemma"])
def test_a_sentencepiece_vocabulary_merges_by_score(
    original: SourceCheckpoint, tmp_path: Path, prefixed: bool
) -> None:
    words = "the engine house stands at the end of the yard then the other line".split()
    singles = sorted(set("".join(words))) + ["\u2581"]
    pieces = {("\u2581" + word)[:size] for word in words for size in range(2, len(word) + 2)}
    pieces |= {word[-size:] for word in words for size in (2, 3) if len(word) >= size}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    merged = sorted(pieces, key=lambda piece: (len(piece), piece))
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(merged))]
    tokens += merged
    tokens += singles
    scores += [-1000.0 - rank for rank in range(len(singles))]
    types += [1] * (len(tokens) - len(types))

    path = write_gguf(tmp_path / "x.gguf", original)
    file = read_gguf(path)
    file.metadata.update(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            **({} if prefixed else {"tokenizer.ggml.add_space_prefix": False}),
        }
    )
    tokenizer = build_tokenizer(file)
    for text in ["the engine", "then the yard ends", "état 7 🙂", "at  the\nend of it"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece_ids(text, tokens, scores, prefixed), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text).ids == [1, *ids]
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]


def test_phi_3_drops_white_space_behind_its_marks(
    original: SourceCheckpoint, tmp_path: Path
) -> None:
    """As its tokenizer_config.json says of all marks but <s>, <unk> and <|endoftext|>."""
    file = read_gguf(write_gguf(tmp_path / "x.gguf", original))
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "\u2581", "\n", "a"]
    file.metadata.update(
        {
            "general.architecture": "phi3",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [2, 3, 4, 3, 3, 1, 1, 1],
            "tokenizer.ggml.add_space_prefix": False,
        }
    )
    tokenizer = build_tokenizer(file)
    for mark, is_bare in (("<|end|>", True), ("</s>", True), ("<|endoftext|>", False)):
        ids = tokenizer.encode(f"{mark}\n a", add_special_tokens=False).ids
        number = tokens.index(mark)
        assert ids == ([number, 7] if is_bare else [number, 6, 5, 7]), mark
