"""Every form against a matrix product in float32 over what its tensors mean; and every cut."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from enginehouse.build.forms.capabilities import GPU_SM, check_gpu, refusal
from enginehouse.build.forms.quantization import (
    FP8_STRETCHES,
    quantize_fp8_rowwise,
    quantize_int4,
)
from enginehouse.build.forms.weight_forms import KV_CACHE_ALGOS, QUANT_CONFIGS
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import pack_int4, quantize_int8
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.torch.attention import PagedKVCache
from enginehouse.runtime.torch.linear import JoinedLinear, make_linear
from makers.engines import EngineMaker, build_engine

SHORT = {"calib_samples": 2, "calib_length": 64, "until": "compile"}


def weights_and_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 256, generator=generator)
    return weight, torch.randn(7, 256, generator=generator)


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def int4_module(group_size: int = 128) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A module with input factors; the weight that its bytes mean; the factors."""
    weight, _ = weights_and_inputs()
    factor = torch.linspace(0.5, 2.0, 256)
    q, scale = quantize_int4(weight / factor, group_size, torch.float32)
    module = {
        "weight": pack_int4(q),
        "weights_scaling_factor": scale,
        "prequant_scaling_factor": factor,
    }
    return module, q.float() * scale.repeat_interleave(group_size, dim=1), factor


def test_fp8_rowwise_rounds_each_token_by_its_own_scale() -> None:
    weight, x = weights_and_inputs()
    x[3] *= 1000
    q, scale = quantize_fp8_rowwise(weight)
    linear = make_linear([{"weight": q, "per_channel_scale": scale}], torch.float32)
    token = x.abs().amax(1, keepdim=True) / 448
    wanted = (e4m3(x / token) * token) @ (q.float() * scale.unsqueeze(1)).T
    # sums of numbers as large as x[3]'s, in another order
    torch.testing.assert_close(linear(x), wanted, rtol=1e-4, atol=1e-2)


def test_fp8_rows_have_the_scale_of_the_least_error() -> None:
    """Beside the largest magnitude's, and all that any of the others would give."""
    weight, _ = weights_and_inputs()
    weight[5] = 0
    q, scale = quantize_fp8_rowwise(weight)
    assert scale.dtype == torch.float32 and float(scale[5]) == 1
    largest = weight.abs().amax(1)
    errors = []
    for stretch in FP8_STRETCHES:
        divisor = (torch.where(largest > 0, largest / 448, 1.0) * stretch).unsqueeze(1)
        errors.append((e4m3(weight / divisor) * divisor - weight).square().sum(1))
    assert FP8_STRETCHES[0] == 1
    found = (q.float() * scale.unsqueeze(1) - weight).square().sum(1)
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-5, atol=0)
    assert torch.equal(q.float(), e4m3(weight / scale.unsqueeze(1)))
    assert float(found.sum()) < 0.97 * float(errors[0].sum())


def test_awq_multiplies_x_by_the_factors() -> None:
    module, meant, factor = int4_module()
    _, x = weights_and_inputs()
    linear = make_linear([module], torch.float32)
    torch.testing.assert_close(linear(x), (x * factor) @ meant.T, rtol=1e-4, atol=1e-3)


def test_w4a8_rounds_x_to_e4m3_and_gives_both_scales_back() -> None:
    module, meant, factor = int4_module()
    _, x = weights_and_inputs()
    second, activation = torch.tensor([0.01]), torch.tensor([0.02])
    module |= {"weights_scaling_factor_2": second, "activation_scaling_factor": activation}
    halves = (module["weights_scaling_factor"] / second).half().float()
    meant = meant / module["weights_scaling_factor"].repeat_interleave(128, dim=1)
    meant = meant * halves.repeat_interleave(128, dim=1)
    wanted = e4m3(x * (factor / activation)) @ meant.T * (second * activation)
    linear = make_linear([module], torch.float32)
    torch.testing.assert_close(linear(x), wanted, rtol=1e-4, atol=1e-3)
    bias = torch.arange(64.0)
    torch.testing.assert_close(
        make_linear([{**module, "bias": bias}], torch.float32)(x),
        wanted + bias,
        rtol=1e-4,
        atol=1e-3,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_int8_has_a_scale_for_each_output_on_each_rank(ranks: int) -> None:
    weight, x = weights_and_inputs()
    parts = [quantize_int8(part) for part in weight.chunk(ranks, dim=1)]
    module = {
        "weight": torch.cat([part.q for part in parts], dim=1),
        "per_channel_scale": torch.stack([part.scale for part in parts], dim=1),
    }
    meant = torch.cat([part.q.float() * part.scale.unsqueeze(1) for part in parts], dim=1)
    torch.testing.assert_close(
        make_linear([module], torch.float32)(x), x @ meant.T, rtol=1e-4, atol=1e-3
    )
    step = torch.cat([p.scale.unsqueeze(1).expand_as(p.q) for p in parts], dim=1)
    assert ((meant - weight).abs() <= step * 1.001).all(), "the largest loses up to a whole step"


def test_modules_that_share_no_input_scale_run_one_by_one() -> None:
    module, meant, factor = int4_module()
    _, x = weights_and_inputs()
    other = {**module, "prequant_scaling_factor": factor.flip(0)}
    linear = make_linear([module, other], torch.float32)
    assert isinstance(linear, JoinedLinear) and linear.out_features == 128
    wanted = torch.cat([(x * factor) @ meant.T, (x * factor.flip(0)) @ meant.T], dim=1)
    torch.testing.assert_close(linear(x), wanted, rtol=1e-4, atol=1e-3)


FORMS = ["fp8", "fp8_rowwise", "int4", "int4_awq", "w4a8_awq"]


@pytest.mark.parametrize("quant", FORMS)
def test_the_shards_of_every_form_merge_into_what_one_gpu_gets(
    make_engine: EngineMaker, quant: str
) -> None:
    group = {} if quant.startswith("fp8") else {"group_size": 128 if quant[0] == "w" else 64}
    whole = make_engine(quant=quant, **SHORT, **group)
    weights = CheckpointWeights(whole, read_config(whole))
    cuts = [(2, 1), (2, 2)] if quant == "w4a8_awq" else [(2, 1), (4, 2)]
    for tp, pp in cuts:
        path = make_engine(quant=quant, tp=tp, pp=pp, **SHORT, **group)
        cut = CheckpointWeights(path, read_config(path))
        for layer in range(2):
            ours, theirs = (w(f"transformer.layers.{layer}.") for w in (cut, weights))
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                bytes_of = [t.contiguous().view(torch.uint8) for t in (tensor, theirs[name])]
                assert torch.equal(*bytes_of), (quant, tp, pp, name)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
def test_int8_is_quantised_on_each_rank_as_its_loader_would(
    make_engine: EngineMaker, tp: int, pp: int
) -> None:
    path = make_engine(quant="int8", tp=tp, pp=pp, until="compile")
    plain = make_engine(quant="none", until="compile")
    config = read_config(path)
    weights, dense = CheckpointWeights(path, config), CheckpointWeights(plain, read_config(plain))
    for layer in range(2):
        ours, theirs = (w(f"transformer.layers.{layer}.") for w in (weights, dense))
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
            weight = theirs[f"{module}.weight"].float()
            row = module in ("attention.dense", "mlp.proj")
            parts = weight.chunk(tp, dim=1) if row else [weight]
            for part, q, scale in zip(
                parts,
                ours[f"{module}.weight"].chunk(len(parts), dim=1),
                ours[f"{module}.per_channel_scale"].view(len(weight), -1).unbind(1),
                strict=True,
            ):
                step = part.abs().amax(1) / 128
                assert torch.equal(scale, step.bfloat16())
                wanted = (part / step.unsqueeze(1)).round().clamp(-128, 127)
                assert torch.equal(q.float(), wanted), module
    assert weights("lm_head.")["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("quant", [quant for quant in QUANT_CONFIGS if quant != "none"])
def test_every_form_says_nearly_what_the_model_says(make_engine: EngineMaker, quant: str) -> None:
    path = make_engine(quant=quant, calib_samples=4, calib_length=128, tp=2, pp=2)
    figures = json.loads((path / "manifest.json").read_text())["verify"]
    limit = {"fp8": 0.01, "fp8_rowwise": 0.01, "int8": 0.001}.get(quant, 0.1)
    assert 0 <= figures["mean_kl"] < limit, figures


@pytest.mark.parametrize(
    ("quant", "kind"), [("fp8", "fp8"), ("fp8_rowwise", "fp8"), ("none", "int8")]
)
def test_the_kv_cache_scale_is_that_of_the_rotated_keys_and_values(
    tiny_checkpoint: Path,
    tiny_source: SourceCheckpoint,
    make_engine: EngineMaker,
    quant: str,
    kind: str,
) -> None:
    from transformers import AutoModelForCausalLM

    from enginehouse.build.quantize.calibration import calibration_sequences

    path = make_engine(quant=quant, kv_cache_dtype=kind, tp=2, pp=2, **SHORT)
    config = read_config(path)
    assert config.quantization.kv_cache_quant_algo == kind.upper()
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    largest = [0.0, 0.0]
    with torch.inference_mode():
        for ids in calibration_sequences(tiny_checkpoint, 2, 64, tiny_source.bos_token_id):
            cache = model(ids.unsqueeze(0), use_cache=True).past_key_values
            for i, layer in enumerate(cache.layers):
                largest[i] = max(
                    largest[i], float(layer.keys.abs().max()), float(layer.values.abs().max())
                )
    weights = CheckpointWeights(path, config)
    for i, amax in enumerate(largest):
        scale = weights(f"transformer.layers.{i}.attention.kv_cache_scaling_factor")[""]
        assert scale.dtype == torch.float32 and scale.shape == (1,)
        assert float(scale) == pytest.approx(amax / (448 if kind == "fp8" else 127), rel=1e-4)


@pytest.mark.parametrize("kind", ["FP8", "INT8"])
def test_the_cache_holds_rounded_values_and_reads_them_multiplied(
    make_engine: EngineMaker, kind: str
) -> None:
    from dataclasses import replace

    config = read_config(make_engine(quant="none", until="compile"))
    quantization = replace(config.quantization, kv_cache_quant_algo=kind)
    config = replace(config, quantization=quantization)
    scales = [0.01, 0.02]
    cache = PagedKVCache(config, 4, 16, torch.float32, scales)
    assert PagedKVCache.bytes_per_token(config, torch.bfloat16) == 2 * 4 * 2 * 32
    k, v = torch.randn(2, 5, 4, 32, generator=torch.Generator().manual_seed(0))
    cache.write(1, torch.arange(16, 21), k, v)
    kv = cache.read(1, torch.tensor([1]))[:, :5].view(2, 4, 5, 32).transpose(1, 2)
    x = torch.stack([k, v]) / 0.02
    wanted = e4m3(x) if kind == "FP8" else x.round().clamp(-128, 127)
    torch.testing.assert_close(kv, wanted * 0.02)
    assert cache.layers[1].element_size() == 1
    torch.testing.assert_close(cache.round_trip(1, k), wanted[0] * 0.02)


def test_excluded_linears_stay_as_they_are(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tmp_path: Path
) -> None:
    path = build_engine(
        tiny_source,
        tmp_path / "e",
        quant="int4_awq",
        exclude="*mlp.proj, *layers.0.attention*",
        calib_samples=2,
        calib_length=64,
    )
    written = json.loads((path / "config.json").read_text())["quantization"]["exclude_modules"]
    assert written[-2:] == ["*mlp.proj", "*layers.0.attention*"] and "*lm_head" in written
    dense = make_engine(quant="none", until="compile")
    with (
        safe_open(path / "rank0.safetensors", framework="pt") as ours,
        safe_open(dense / "rank0.safetensors", framework="pt") as plain,
    ):
        for name in plain.keys():
            kept = "mlp.proj" in name or "layers.0.attention" in name
            if kept:
                assert torch.equal(ours.get_tensor(name), plain.get_tensor(name))
        assert ours.get_tensor("transformer.layers.1.attention.qkv.weight").dtype == torch.int8


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"quant": "int4", "exclude": "mlp.proj"}, "'mlp.proj' matches no module; .*write, say"),
        ({"quant": "fp8", "exclude": "*mlp.fc"}, "mlp.fc without .*mlp.gate.*exclude both"),
        ({"quant": "int8", "exclude": "*mlp.proj"}, "mlp.proj cannot be left out of int8"),
        ({"quant": "int4", "kv_cache_dtype": "fp8"}, "FP8 KV cache needs FP8 weights"),
        (
            {"kv_cache_dtype": "int8", "backend": "tensorrt_llm"},
            "no INT8 KV cache with use_paged_context_fmha",
        ),
        ({"quant": "fp8", "gpu": "a100"}, r"not run on a100 \(SM80\): .*SM89; choose .*int4, int4"),
        (
            {"quant": "int4", "gpu": "b200"},
            r"\(SM100\): .*above SM90; choose quant among none, fp8",
        ),
        (
            {"quant": "fp8_rowwise", "gpu": "rtx5090"},
            "SM89 and SM90; choose quant among none, fp8",
        ),
        ({"quant": "w4a8_awq", "gpu": "a100"}, "FP8 activations need SM89"),
        (
            {"quant": "int4", "gpu": "h100", "kv_cache_dtype": "fp8"},
            "quant among fp8, fp8_rowwise, or kv_cache_dtype among auto, int8",
        ),
        (
            {"gpu": "h100", "kv_cache_dtype": "fp8", "backend": "tensorrt_llm"},
            "fp8_rowwise, or kv_cache_dtype among auto$",
        ),
        (
            {"quant": "fp8", "kv_cache_dtype": "fp8", "gpu": "a100"},
            "choose kv_cache_dtype=auto with quant among none, int4, int4_awq, int8$",
        ),
        (
            {"quant": "fp8", "gpu": "a100", "format": "hf"},
            "choose quant among none, int4, int4_awq, w4a16_nvfp4, mxfp8$",
        ),
        ({"quant": "int8", "gpu": "b200", "format": "hf"}, "quant=int8 has no layout"),
        ({"quant": "w4a8_awq", "group_size": 64}, "group_size=64 has no kernel for w4a8_awq"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(
    tiny_source: SourceCheckpoint, flags: dict[str, object], wanted: str
) -> None:
    with pytest.raises(PlanError, match=wanted):
        make_plan(load_settings(flags), tiny_source)


TARGETS = [{"backend": "torch"}, {"backend": "tensorrt_llm"}, {"format": "hf"}]


@pytest.mark.parametrize("gpu", ["a100", "a40", "l40s", "h100", "b200", "rtx5090"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_choice_that_a_refusal_of_a_gpu_names_is_legal(
    tiny_source: SourceCheckpoint, target: dict[str, str], gpu: str
) -> None:
    for quant, kv_cache_dtype in product(QUANT_CONFIGS, KV_CACHE_ALGOS):
        flags = {**target, "gpu": gpu, "quant": quant, "kv_cache_dtype": kv_cache_dtype}
        try:
            make_plan(load_settings(flags), tiny_source)
            continue
        except PlanError as error:
            message = str(error)
        if "does not run on" not in message:
            continue
        if "kv_cache_dtype=auto with" in message:
            flags["kv_cache_dtype"] = "auto"
        named = re.findall(r"(quant|kv_cache_dtype) among ([a-z0-9_, ]+?)(?:, or|$)", message)
        assert named, message
        for key, values in named:
            for value in values.split(", "):
                assert make_plan(load_settings({**flags, key: value}), tiny_source)


def test_the_capability_table_has_an_answer_for_every_gpu() -> None:
    runs = {
        (gpu, quant)
        for gpu, sm in GPU_SM.items()
        for quant in QUANT_CONFIGS
        if refusal(quant, sm, "auto") is None
    }
    assert {gpu for gpu, quant in runs if quant == "fp8_rowwise"} == {
        gpu for gpu, sm in GPU_SM.items() if sm in (89, 90)
    }
    assert {q for gpu, q in runs if gpu == "a100"} == {"none", "int4", "int4_awq", "int8"}
    assert {q for gpu, q in runs if gpu == "b200"} == {"none", "fp8"}
    assert {q for gpu, q in runs if gpu == "h100"} == set(QUANT_CONFIGS)
    for gpu, quant in runs:
        check_gpu(gpu, quant, "auto")
