"""Every family, form, TP and PP: what the ranks hold is the whole model again, on odd shapes too,
and a cut that is illegal is refused with the legal ones, before a byte is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as Named
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS, OutputTensor
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.runtime.checkpoint.sharding import merge_tensors, shard_tensor
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import Mapping, ModelConfig, QuantConfig
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import PlanError
from makers.engines import build_engine
from makers.family_models import (
    FAMILIES,
    LATENTS,
    MIXTURES,
    OF_OWN_LAYERS,
    OF_SEVERAL_SIZES,
    SIZES,
    save_family,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ZERO_POINTS = replace(QUANT_CONFIGS["int4"], has_zero_point=True)
FORMS: dict[str, QuantConfig] = {**QUANT_CONFIGS, "int4 with zero points": ZERO_POINTS}
# Not of families whose sizes follow from others than those that are drawn here, or layer by layer.
DENSE_AND_MIXTURES = [
    (family, form)
    for family in sorted(FAMILIES.keys() - LATENTS - OF_SEVERAL_SIZES - OF_OWN_LAYERS)
    for form in FORMS
    if family not in MIXTURES or form in ("none", "fp8", "fp8_rowwise", "int4")
]


@cache
def family_config(family: str, form: str) -> ModelConfig:
    kind, changes = FAMILIES[family]
    hf = getattr(transformers, kind)(**{**SIZES, **changes})
    name = kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")
    config = model_config({**hf.to_dict(), "architectures": [name]}, "bfloat16")
    return replace(config, quantization=replace(FORMS[form], group_size=64))


def random_tensor(table: OutputTensor, generator: torch.Generator) -> Tensor:
    """Random bytes of the table's dtype: merging must not change one bit."""
    dtype: torch.dtype = getattr(torch, table.dtype)
    count = int(torch.Size(table.shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(table.shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return same and torch.equal(*bits)


def linear(heads: int, layers: int, head_size: int) -> dict[str, Any]:
    """Linear attention in every other layer, of whole groups on each rank."""
    return {
        "layers": list(range(0, layers, 2)),
        "num_key_heads": heads,
        "num_value_heads": 2 * heads,
        "key_head_dim": head_size,
        "value_head_dim": 64,
        "conv_kernel": 3,
    }


@settings(max_examples=400, deadline=None)
@given(
    case=st.sampled_from(DENSE_AND_MIXTURES),
    tp=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    queries=st.integers(1, 4),
    kv_heads=st.integers(1, 6),
    head_pairs=st.integers(1, 3),
    inner=st.integers(1, 2),
    vocab=st.integers(1, 70),
    layers=st.integers(1, 5),
    pp=st.integers(1, 5),
    biases=st.booleans(),
)
def test_merging_every_tensor_of_every_rank_gives_the_model_back(
    case: tuple[str, str],
    tp: int,
    queries: int,
    kv_heads: int,
    head_pairs: int,
    inner: int,
    vocab: int,
    layers: int,
    pp: int,
    biases: bool,
) -> None:
    assume(kv_heads % tp == 0 or tp % kv_heads == 0)
    assume(queries * kv_heads % tp == 0 and pp <= layers)
    config = family_config(*case)
    dense = config.num_experts == 0 and not config.gate_in_fc
    width = 64 * tp  # whole groups on each rank
    per_rank = queries * kv_heads // tp
    head = 2 * head_pairs if case[1] in ("none", "fp8", "fp8_rowwise", "int8") else 64
    config = replace(
        config,
        vocab_size=vocab,
        num_hidden_layers=layers,
        num_attention_heads=per_rank * tp,
        num_key_value_heads=kv_heads,
        head_size=head,
        hidden_size=width,
        intermediate_size=width * inner,
        attn_bias=biases and case[0] == "llama",
        mlp_bias=biases and dense and case[0] == "llama",
        extra={
            **config.extra,
            **({"moe_intermediate_size": width * inner} if config.num_experts else {}),
            **({"linear_attention": linear(per_rank * tp, layers, head)} if config.delta else {}),
        },
    )
    whole = config.with_mapping(Mapping())
    cut = config.with_mapping(Mapping(tp, pp))
    generator = torch.Generator().manual_seed(3)
    model = {n: random_tensor(t, generator) for n, t in output_tensors(whole, 0).items()}
    seen = set()
    for pp_rank in range(pp):
        first = cut.mapping.layers(pp_rank, layers).start
        for name, table in output_tensors(cut, pp_rank).items():
            head, layer, rest = (*re.split(r"(?<=layers)\.(\d+)\.", name), "", "")[:3]
            full = f"{head}.{first + int(layer)}.{rest}" if layer else name
            parts = [shard_tensor(name, model[full], cut, rank) for rank in range(tp)]
            assert {tuple(part.shape) for part in parts} == {table.shape}, name
            assert {part.dtype for part in parts} == {model[full].dtype}, name
            assert same_bits(merge_tensors(name, parts, cut), model[full]), name
            seen.add(full)
    assert seen == set(model)


CUT_AGAIN = (
    *("qwen2", "qwen3", "phi3", "gemma2", "mixtral", "qwen3-moe", "gpt-neox", "phimoe-tied"),
    *("gemma3n", "gemma4-small", "gemma4-moe", "gpt-oss", "qwen3.5", "qwen3-next"),
)


@pytest.mark.parametrize("family", CUT_AGAIN)
def test_a_familys_folder_is_cut_again_bit_for_bit(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_family(family, tmp_path / "in"))
    few: dict[str, Any] = {"calib_samples": 1, "calib_length": 16}
    for quant in ("none", "fp8") if family in MIXTURES else ("none", "fp8_rowwise", "int4", "int8"):
        group = {"group_size": 64} if quant == "int4" else few if quant == "fp8" else {}
        one, other, back = (tmp_path / f"{quant}-{i}" for i in range(3))
        build_engine(source, one, quant=quant, until="convert", **group)
        build_engine(resolve_source(str(one), one), other, tp=2, pp=2, until="convert")
        build_engine(resolve_source(str(other), other), back, until="convert")
        first, last = (CheckpointWeights(path, read_config(path)) for path in (one, back))
        for prefix in ("transformer.", "lm_head."):
            wanted, found = first(prefix), last(prefix)
            assert wanted.keys() == found.keys()
            assert all(same_bits(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "family",
    ["phi3", "gemma2", "mixtral", "qwen3-moe", "gpt-neox", "gemma3n", "gemma4-small", "qwen3.5"],
)
def test_a_familys_folder_reads_by_hugging_faces_names(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_family(family, tmp_path / "in"))
    folder = build_engine(source, tmp_path / "e", tp=2, pp=2, until="convert", dtype="float32")
    again = resolve_source(str(folder), folder).tensors
    for name in again.infos:
        tied = name == "lm_head.weight" and name not in source.tensors.infos
        truth = source.tensors.read("model.embed_tokens.weight" if tied else name)
        torch.testing.assert_close(again.read(name), truth, rtol=1e-6, atol=1e-6)


class Headers:
    """A TensorSource of which only the headers exist."""

    def __init__(self, config: ModelConfig) -> None:
        self.infos: Named[str, TensorInfo] = {
            name: TensorInfo(torch.bfloat16, shape)
            for name, shape in expected_shapes(config).items()
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        raise AssertionError(f"{name} was read")


def headers_of(hf: dict[str, Any]) -> SourceCheckpoint:
    return SourceCheckpoint(
        name="odd",
        kind="safetensors",
        path=Path("odd"),
        config=hf,
        tensors=Headers(model_config(hf, "auto")),
        files=(),
        eos_token_ids=(),
        bos_token_id=None,
        license=None,
        tokenizer_writer=lambda dest: [],
    )


def fits(hf: dict[str, Any], tp: int, form: str, group: int) -> bool:
    """Whether the ranks of tp hold a real split, from the contract's rules, linear by linear."""
    heads, kv, head = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    hidden, inner = hf["hidden_size"], hf["intermediate_size"]
    if heads % tp or inner % tp:
        return False
    held = [{kv * rank // tp + i for i in range(-(-kv // tp))} for rank in range(tp)]
    if max(map(max, held)) >= kv or (tp < kv and sum(map(len, held)) != kv):
        return False  # a head that is none, or one held twice while another is not
    if tp > kv and len({sum(k in ranks for ranks in held) for k in range(kv)}) > 1:
        return False  # heads that are held by more ranks than others
    query, key = heads // tp * head, -(-kv // tp) * head
    linears = [(query + 2 * key, hidden), (hidden, query), (inner // tp, hidden)]
    linears += [(hidden, inner // tp)]
    for i, (out, inn) in enumerate(linears):
        if form == "int8" and (inn % 64 or out % 16):
            return False
        if form == "int4":
            whole = (out, inn * tp) if i in (1, 3) else (out * tp, inn)
            padded = [-(-size // (group * tp)) * group * tp for size in whole]
            if list(whole) != padded:
                return False
    return True


@settings(max_examples=250, deadline=None)
@given(
    form=st.sampled_from(["none", "int4", "int8"]),
    kv=st.integers(1, 9),
    queries=st.integers(1, 4),
    head=st.sampled_from([2, 6, 16, 32, 64, 96, 128]),
    hidden=st.sampled_from([2, 48, 64, 128, 192, 320, 512, 768, 1024]),
    inner=st.sampled_from([6, 48, 96, 128, 192, 256, 384, 512, 768, 1152]),
    tp=st.integers(1, 18),
    group=st.sampled_from([None, 64, 128]),
)
def test_a_cut_is_legal_exactly_when_the_contract_says_so(
    form: str, kv: int, queries: int, head: int, hidden: int, inner: int, tp: int, group: int | None
) -> None:
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 33,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 3,
        "num_attention_heads": kv * queries,
        "num_key_value_heads": kv,
        "head_dim": head,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    values: dict[str, Any] = {"quant": form, "tp": tp, "max_seq_len": 64, "pad": False}
    if form == "int4" and group is not None:
        values["group_size"] = group
    groups = (group,) if group is not None else (64, 128)
    sizes = range(1, kv * queries + 1)
    plain = [n for n in sizes if fits(hf, n, "none", 0)]
    legal = [n for n in sizes if any(fits(hf, n, form, g) for g in groups)]
    in_form = [n for n in sizes if any(fits(hf, n, form, g) for g in (64, 128))]
    source = headers_of(hf)
    if tp in legal:
        plan = make_plan(load_settings(values), source)
        assert form != "int4" or fits(hf, tp, form, plan.group_size or 0)
        return
    try:  # padded, it is one that fits, or the hidden size does not
        plan = make_plan(load_settings({**values, "pad": True, "backend": "tensorrt_llm"}), source)
    except PlanError as error:
        assert re.search("hidden_size=|more ranks than the MLP has columns", str(error))
    else:
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        padded = {name: getattr(plan.config, name) for name in names}
        assert fits({**hf, **padded}, tp, form, plan.group_size or 0)
        assert all(padded[name] >= hf[name] for name in names)
    with pytest.raises(PlanError) as caught:
        make_plan(load_settings(values), source)
    listed = re.search(r"(?:choose tp in|legal tp for int\d:) ([\d, ]+|none)", str(caught.value))
    assert listed is not None, str(caught.value)
    wanted = plain if tp not in plain else in_form
    assert listed[1] == (", ".join(map(str, wanted)) or "none")
    if form == "int4" and tp in plain:
        fitting = [str(g) for g in (128, 64) if fits(hf, tp, form, g)]
        assert f"legal group_size at this tp: {', '.join(fitting) or 'none'};" in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(1, 7), pp=st.integers(1, 12))
def test_more_stages_than_layers_are_refused_with_the_legal_ones(layers: int, pp: int) -> None:
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 33,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    if pp <= layers:
        plan = make_plan(load_settings({"pp": pp}), headers_of(hf))
        assert len(plan.rank_bytes) == pp
        return
    with pytest.raises(PlanError, match=f"cut over pp={pp}; choose pp in 1 to {layers}$"):
        make_plan(load_settings({"pp": pp}), headers_of(hf))


@pytest.mark.parametrize("group", [1, 16, 32, 63, 65, 96, 256])
@pytest.mark.parametrize(("quant", "wanted"), [("int4", "128, 64"), ("w4a8_awq", "128")])
def test_a_group_size_without_a_kernel_names_those_with_one(
    group: int, quant: str, wanted: str, tiny_checkpoint: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint)
    unread = replace(source, tensors=Headers(model_config(source.config, "auto")))
    with pytest.raises(PlanError, match=f"group_size={group} has no kernel .* choose {wanted}$"):
        make_plan(load_settings({"quant": quant, "group_size": group}), unread)
