"""Forms that no engine holds: what each means, number by number, and what is said of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from enginehouse.build.dequantize.config import read_stored_layout
from enginehouse.build.dequantize.tensors import DequantizedTensors
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.folder import DiskFolder
from enginehouse.build.sources.hf_checkpoint import SafetensorsSource
from enginehouse.runtime.errors import EnginehouseError
from makers.bitsandbytes_writer import BITSANDBYTES
from makers.engines import build_engine
from makers.family_models import save_family
from makers.hqq_writer import HQQ
from makers.paths import ROOT
from makers.quantized_writers import Kind, Pair, Written, edit_config, write_quantized
from makers.stored_forms import NAMES, STORED, either
from makers.stored_integers import Integers, gptq

pytestmark = pytest.mark.usefixtures("one_thread")


ALL = {**STORED, **BITSANDBYTES, **HQQ}
NAMES_OF_ALL = {
    **NAMES,
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes NF4"),
    "llm.int8": "bitsandbytes INT8",
    **dict.fromkeys(HQQ, "HQQ"),
}


def opened(path: Path, dequantize: bool = True) -> SourceCheckpoint:
    return resolve_source(str(path), path, dequantize=dequantize)


def written(
    kind: str, path: Path, edit: Callable[[Written], None] = lambda tensors: None, **changes: Any
) -> Pair:
    return write_quantized(kind, path, edit, kinds=ALL, **changes)


def assert_means(pair: Pair) -> SourceCheckpoint:
    """The quantised checkpoint gives the float32 one's tensors."""
    source, wanted = opened(pair.quantized), load_file(pair.plain / "model.safetensors")
    assert {name for name in source.tensors.infos if name in wanted} == set(wanted)
    for name, tensor in wanted.items():
        assert source.tensors.infos[name].shape == tensor.shape
        torch.testing.assert_close(source.tensors.read(name).float(), tensor, rtol=1e-6, atol=0)
    return source


@pytest.mark.parametrize("kind", ALL)
def test_a_form_is_read_as_its_document_means_it(kind: str, tmp_path: Path) -> None:
    pair = written(kind, tmp_path)
    source = assert_means(pair)
    plan = make_plan(load_settings({"quant": "fp8"}), source)
    assert plan.rounded_twice is not None
    assert f"rounded twice, to {NAMES_OF_ALL[kind]} and then to fp8" in plan.rounded_twice
    if kind == "w8a8":  # which an engine holds as it is
        plan = make_plan(load_settings({}), opened(pair.quantized, dequantize=False))
        assert plan.settings.quant == "int8"
        return
    with pytest.raises(EnginehouseError, match="pass --dequantize") as caught:
        make_plan(load_settings({}), opened(pair.quantized, dequantize=False))
    assert "\n" not in str(caught.value)


def write_gpt_oss(path: Path, edit: Callable[[Written], None] = lambda tensors: None) -> Pair:
    """The tiny GPT-OSS with experts in MXFP4, and what they mean as transformers reads them."""
    plain, quantized = (
        save_family("gpt-oss", path / "plain"),
        save_family("gpt-oss", path / "mxfp4"),
    )
    rng = np.random.default_rng(5)
    meant = load_file(plain / "model.safetensors")
    stored = dict(meant)
    for name in [name for name in meant if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inn, out = meant[name].shape
        blocks = rng.integers(0, 256, (experts, out, inn // 32, 16), np.uint8)
        scales = rng.integers(121, 125, (experts, out, inn // 32), np.uint8)
        stored[f"{name}_blocks"] = torch.from_numpy(blocks)
        stored[f"{name}_scales"] = torch.from_numpy(scales)
        del stored[name]
        meant[name] = convert_moe_packed_tensors(
            stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32
        )
    edit(stored)
    save_file(meant, plain / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    edit_config(quantized, quantization_config={"quant_method": "mxfp4"})
    return Pair(quantized, plain)


def test_gpt_oss_in_mxfp4_is_built_of_the_experts_that_transformers_reads(tmp_path: Path) -> None:
    pair = write_gpt_oss(tmp_path)
    source = assert_means(pair)
    with pytest.raises(EnginehouseError, match="quant_method='mxfp4'.*: pass --dequantize"):
        opened(pair.quantized, dequantize=False)
    plan = make_plan(load_settings({}), source)
    assert plan.rounded_twice is not None and plan.rounded_twice.startswith(
        "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj: "
    )
    engines = [
        build_engine(each, tmp_path / name, until="convert", dtype="bfloat16")
        for name, each in (("a", source), ("b", resolve_source(str(pair.plain), tmp_path)))
    ]
    ours, theirs = (load_file(engine / "rank0.safetensors") for engine in engines)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("qwen3-moe", kind) for kind in ("deepseek fp8", "nvfp4", "gptq 3 bits")),
        ("deepseek-v3", "deepseek fp8"),
    ],
)
def test_experts_are_read_one_by_one(family: str, kind: str, tmp_path: Path) -> None:
    """And what is latent in DeepSeek's attention, of widths that no block divides."""
    endings = ("_proj", "_proj_with_mqa") if family == "deepseek-v3" else ("experts",)

    def quantises(module: str) -> bool:
        return module.endswith(endings) or ".experts." in module

    source = assert_means(written(kind, tmp_path, family=family, quantises=quantises))
    plan = make_plan(load_settings({"quant": "fp8"}), source)
    assert plan.rounded_twice is not None
    assert "model.layers.*.mlp.experts.*.down_proj, " in plan.rounded_twice


def lose(ending: str) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        del tensors[next(name for name in sorted(tensors) if name.endswith(ending))]

    return edit


def spoil(ending: str, value: float) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        tensors[name].view(-1)[0] = value

    return edit


def crop(ending: str) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        tensors[name] = tensors[name][..., :1].contiguous()

    return edit


DAMAGED: list[tuple[str, Callable[[Written], None], str]] = [
    ("deepseek fp8", lose("weight_scale_inv"), "weight_scale is missing from the FP8 in blocks"),
    ("deepseek fp8", crop("down_proj.weight_scale_inv"), r"shape \[2, 1\]; .* give \[2, 4\]"),
    ("w8a8", spoil("weight_scale", float("inf")), "weight_scale holds NaN or infinite"),
    ("w8a8 asymmetric", lose("weight_zero_point"), "weight_zero_point is missing from the compr"),
    ("w8a16 packed", spoil("weight_shape", 7), r"weight_shape says \[7, 512\]; the packed weight"),
    ("awq gemv", crop("scales"), "scales has shape"),
    ("nvfp4", lose("weight_scale_2"), "weight_scale_2 is missing from the NVFP4 checkpoint"),
    ("mxfp8", spoil("weight_scale", 255), "weight_scale holds NaN"),
    ("mixed precision", lose("v_proj.weight_scale"), "weight_scale is missing from the FP8"),
]


@pytest.mark.parametrize(("kind", "edit", "wanted"), DAMAGED)
def test_a_damaged_checkpoint_is_one_sentence_and_leaves_nothing(
    kind: str, edit: Callable[[Written], None], wanted: str, tmp_path: Path
) -> None:
    path = written(kind, tmp_path / "in", edit).quantized
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        build_engine(opened(path), tmp_path / "out" / "e", quant="int4", until="convert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    (
        "gptq 8 bits",
        {"bits": 9},
        "a GPTQ checkpoint with bits=9; wanted 2 to 8",
    ),
    ("gptq 8 bits", {"group_size": 0}, "group_size=0; wanted a number of inputs, or -1"),
    (
        "gptq 8 bits",
        {"checkpoint_format": "marlin"},
        "format='marlin'; wanted the words",
    ),
    ("awq gemv", {"version": "gemv_fast"}, "version='gemv_fast'; wanted 'gemm' or 'gemv'"),
    (
        "deepseek fp8",
        {"weight_block_size": [128]},
        r"block_size=\[128\]; wanted two numbers",
    ),
    ("w8a8", {"transform_config": {"R1": {}}}, "rotations are no part of the weights"),
    ("auto-round mxfp4", {"data_type": "nvfp4_v2"}, "data_type='nvfp4_v2'; wanted 'int', or mx_fp"),
    ("quark", {"global_quant_config": {"weight": {"dtype": "int4"}}}, "weight='int4, None, None,"),
    ("w8a8", {"format": "marlin-24"}, "weights='int 8 bit, channel, marlin-24'; wanted"),
    ("nvfp4", {"quant_algo": "NVFP4_SVD"}, "quant_algo='NVFP4_SVD'; wanted FP8"),
    ("mixed precision", {"quantized_layers": {}}, "quantized_layers={}; wanted an algorithm for"),
    ("w8a8", {"quant_method": "higgs"}, "quant_method='higgs'; --dequantize reads AutoAWQ"),
]


@pytest.mark.parametrize(("kind", "changes", "wanted"), CONFIGS)
def test_what_is_not_read_is_refused_by_its_config(
    kind: str, changes: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        read_stored_layout({**ALL[kind].config, **changes})
    assert "\n" not in str(caught.value)


def test_what_is_read_in_no_way_names_the_unquantised_checkpoint(tmp_path: Path) -> None:
    path = written("w8a8", tmp_path, quant_method="higgs").quantized
    for dequantize in (False, True):
        with pytest.raises(EnginehouseError, match="quant_method='higgs'.*: give the unquantised"):
            opened(path, dequantize=dequantize)


@pytest.mark.parametrize(
    ("method", "key", "name"),
    [
        ("gptq", "dynamic", r"+:.*\.down_proj"),
        ("auto-round", "extra_config", r".*\.down_proj"),
        ("auto-round", "extra_config", "model.layers.0.mlp.down_proj"),
    ],
)
def test_modules_with_bits_of_their_own_are_read_with_them(
    method: str, key: str, name: str, tmp_path: Path
) -> None:
    """Four bits, and eight bits in larger groups for some."""
    ending = "layers.0.mlp.down_proj" if name.startswith("model") else "down_proj"
    own = {name: {"bits": 8, "group_size": 128}}
    config = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True, key: own}
    kind = Kind(
        lambda: either(gptq(Integers(4, 32, True), 1), gptq(Integers(8, 128, True), 1), (ending,)),
        {**config, "packing_format": "auto_round:auto_gptq"},
        "",
    )
    pair = write_quantized("mixed", tmp_path, kinds={"mixed": kind})
    source = assert_means(pair)
    assert source.dequantized is not None
    assert source.dequantized.name == "GPTQ of 4 bits and GPTQ of 8 bits"


def broken_state(text: str) -> Callable[[Written], None]:
    def edit(tensors: Written) -> None:
        name = next(name for name in sorted(tensors) if "quant_state" in name)
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


@pytest.mark.parametrize(
    ("kind", "edit", "wanted"),
    [
        ("nf4", broken_state("{"), "bitsandbytes__nf4 is not what bitsandbytes writes"),
        ("nf4", broken_state('{"shape": [1, 2, 3], "blocksize": 64}'), "is not what bitsandbytes"),
        ("nf4", broken_state('{"shape": [64, 64], "blocksize": 64}'), r"state says \[64, 64\]"),
        ("nf4 nested", broken_state('{"shape": [256, 512], "blocksize": 64}'), "and nested_offset"),
        ("nf4 nested", lose("nested_absmax"), "nested_absmax is missing from the bitsandbytes NF4"),
        ("nf4", spoil("absmax", float("nan")), "weight.absmax holds NaN"),
        ("llm.int8", spoil("weight_format", 1), "weight_format is 1; wanted 0, rows in order"),
        ("llm.int8", lose("SCB"), "SCB is missing from the bitsandbytes INT8 checkpoint"),
        ("hqq 4 bits", spoil("quant_scale", 1), "quant_scale says that scales are quantised too"),
        ("hqq 4 bits", spoil("axis", 2), r"axis=\[2\] and shape"),
        ("hqq 4 bits", spoil("packing", 65), "packing='Abit_u8'"),
        ("hqq 3 bits", spoil("group_size", 7), "group_size=7, which does not divide it"),
        ("hqq 3 bits", crop("W_q"), "W_q has .* bytes in shape"),
        ("hqq 8 bits", lose("_proj.scale"), "scale is missing from the HQQ checkpoint"),
    ],
)
def test_a_damaged_module_that_says_its_own_shape_is_refused(
    kind: str, edit: Callable[[Written], None], wanted: str, tmp_path: Path
) -> None:
    path = written(kind, tmp_path / "in", edit).quantized
    with pytest.raises(EnginehouseError, match=wanted) as caught:
        build_engine(opened(path), tmp_path / "out" / "e", until="convert")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


CONTRACT = json.loads((ROOT / "tests/contract/hf/bitsandbytes-0.50.json").read_text())["cases"]


def decoded(stored: dict[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(stored["base64"])), dtype=torch.uint8)
    return raw.view(getattr(torch, stored["dtype"])).view(stored["shape"])


@pytest.mark.parametrize("case", CONTRACT)
def test_what_bitsandbytes_packed_is_read_as_it_dequantises_it(case: str, tmp_path: Path) -> None:
    tensors = {f"m.{name}": decoded(each) for name, each in CONTRACT[case]["tensors"].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": case}
    said = {"load_in_8bit": True} if case == "int8" else kind
    layout = read_stored_layout({"quant_method": "bitsandbytes", **said})
    source = DequantizedTensors(SafetensorsSource(DiskFolder(tmp_path)), layout)
    wanted = decoded(CONTRACT[case]["dequantized"])
    assert source.infos["m.weight"].shape == wanted.shape
    torch.testing.assert_close(source.read("m.weight"), wanted, rtol=1e-6, atol=1e-9)
