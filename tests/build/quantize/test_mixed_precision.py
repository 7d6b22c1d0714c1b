"""MIXED_PRECISION: what a group costs against transformers, the choice against every other one."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.build.backends import hf
from enginehouse.build.forms.block_floats import NVFP4_BLOCK, dequantize_blocks
from enginehouse.build.forms.block_quantization import quantize_nvfp4
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.build_plan import BuildPlan, with_forms
from enginehouse.build.quantize.mixed_precision import (
    BITS,
    Group,
    choose_forms,
    measure_groups,
)
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.sources.safetensors_file import SAFETENSORS_DTYPES, read_safetensors_header
from enginehouse.runtime.errors import PlanError
from makers.engines import SourceMaker
from makers.family_models import load_family
from makers.hf_checkpoints import exported
from makers.paths import CONTRACT

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("nvfp4", "fp8")
IDS = torch.tensor([5, 17, 300, 42, 7, 256, 99, 12, 480, 3, 77, 150])


def drawn_groups(seed: int) -> list[Group]:
    """Six groups whose forms lose about as rounding does, and one that gains by chance."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(6):
        first, ratio = torch.rand(2, generator=generator).tolist()
        kl = {"nvfp4": first, "fp8": first * ratio * (1.3 if i == 0 else 0.5), "none": 0.0}
        groups.append(Group((f"linear{i}",), 10 * (1 + i % 3), kl))
    return groups


def totals(groups: list[Group], forms: tuple[str, ...]) -> tuple[float, float]:
    weights = sum(group.num_weights for group in groups)
    pairs = list(zip(groups, forms, strict=True))
    bits = sum(BITS[form] * group.num_weights for group, form in pairs) / weights
    return bits, sum(group.kl[form] for group, form in pairs)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_of_as_few_bits_loses_less(seed: int) -> None:
    groups = drawn_groups(seed)
    most = totals(groups, ("nvfp4",) * 6)[1]
    every = [totals(groups, forms) for forms in product(BITS.keys() - {"w4a16_nvfp4"}, repeat=6)]
    for share in (0.9, 0.5, 0.1):
        found = choose_forms(groups, None, share * most)
        assert found.kl <= share * most
        chosen = tuple(found.forms.get(group.modules[0], "none") for group in groups)
        assert (found.bits, found.kl) == pytest.approx(totals(groups, chosen))
        assert not any(bits <= found.bits and kl < found.kl - 1e-9 for bits, kl in every)


@pytest.mark.parametrize("bits", [4.5, 5.0, 6.0, 9.5])
def test_a_budget_of_bits_is_kept_and_spent(bits: float) -> None:
    groups = drawn_groups(1)
    found = choose_forms(groups, bits, None)
    assert found.bits <= bits
    smallest = totals(groups, ("nvfp4",) * 6)
    assert found.kl <= smallest[1]
    assert found.bits > bits - 2.5 or bits == 4.5  # the largest group's next step is dearer


def test_budgets_that_nothing_meets_are_refused() -> None:
    groups = drawn_groups(2)
    with pytest.raises(PlanError, match="effective_bits=4 is below the 4.5"):
        choose_forms(groups, 4.0, None)
    with pytest.raises(PlanError, match="max_kl=0 leaves no linear quantised"):
        choose_forms(groups, None, 0.0)


def test_a_group_costs_what_transformers_loses_by_it(family_source: SourceMaker) -> None:
    """q, k and v of the second layer, rounded to NVFP4 alone."""
    source = family_source("biased")
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    groups = measure_groups(
        reference, IDS, ("w4a16_nvfp4", "fp8"), lambda name: False, lambda n: None
    )
    assert len(groups) == 8
    found = next(g for g in groups if g.modules == ("transformer.layers.1.attention.qkv",))
    model = load_family(source.path)

    def log_probabilities() -> torch.Tensor:
        with torch.inference_mode():
            return model(IDS.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)

    before = log_probabilities()
    attention = model.get_submodule("model.layers.1.self_attn")
    linears = [attention.get_submodule(f"{name}_proj") for name in "qkv"]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    q, scale, second = quantize_nvfp4(weight)
    rounded = dequantize_blocks(q, scale, NVFP4_BLOCK, second)
    parts = rounded.split([len(linear.weight) for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data.copy_(part)
    kl = float((before.exp() * (before - log_probabilities())).sum(-1).mean())
    assert found.kl["w4a16_nvfp4"] == pytest.approx(kl, rel=1e-3)
    assert 0 < found.kl["fp8"] < 0.2 * kl
    assert found.num_weights == weight.numel()


def test_names_and_words_are_modelopts(
    family_source: SourceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own checkpoint of attention in FP8 and MLPs in NVFP4."""
    table = json.loads((CONTRACT / "hf" / "modelopt-0.47.json").read_text())["mixed"]

    def choose(plan: BuildPlan, *rest: Any) -> BuildPlan:
        layers = [f"transformer.layers.{i}." for i in range(plan.config.num_hidden_layers)]
        forms = {f"{layer}attention.{name}": "fp8" for layer in layers for name in ("qkv", "dense")}
        mlp = ("fc", "gate", "proj")
        return with_forms(
            plan, forms | {f"{layer}mlp.{name}": "nvfp4" for layer in layers for name in mlp}
        )

    monkeypatch.setattr(hf, "choose_mixture", choose)
    settings = {"quant": "mixed", "effective_bits": 8.0, "dtype": "bfloat16"}
    path = exported(family_source("llama"), tmp_path / "hf", **settings)
    header = read_safetensors_header(path / "model.safetensors")
    words = {dtype: word for word, dtype in SAFETENSORS_DTYPES.items()}
    found = {name: [words[item.dtype], list(item.shape)] for name, item in header.items()}
    assert found == table["tensors"]
    file = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    inline = json.loads((path / "config.json").read_text())["quantization_config"]
    theirs = table["hf_quant_config"]["quantization"]
    excluded = ["lm_head", "model.embed_tokens"]  # where ModelOpt has none
    assert file == {**theirs, "exclude_modules": excluded}
    more = {"ignore": excluded, "producer": inline["producer"]}
    assert inline == table["quantization_config"] | more
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["choices"]["quantized_layers"]["transformer.layers.0.mlp.fc"] == "NVFP4"
