"""AWQ: what the search finds, what compensated rounding gains, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from enginehouse.build.forms.quantization import Int4Weight, quantize_int4
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.awq import (
    fit_prequant,
    quantize_awq,
    round_int4,
    search_prequant,
    search_scale,
)
from enginehouse.build.quantize.calibration import calibration_sequences, passages
from enginehouse.build.quantize.compensation import InputMoments
from enginehouse.build.quantize.layerwise_awq import LayerwiseAwq
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from makers.engines import EngineMaker


def skewed(seed: int = 0) -> tuple[Tensor, Tensor, InputMoments]:
    """A weight, inputs whose channels differ in size and hang together, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 128, generator=generator)
    mixing = torch.randn(128, 128, generator=generator) * 0.1 + torch.eye(128)
    x = torch.randn(600, 128, generator=generator) @ mixing
    x[:, ::17] *= 20
    moments = InputMoments(128)
    moments.add(x[:250])
    moments.add(x[250:])
    return weight, x, moments


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight - other).T).square().sum())


def meant(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale.float().repeat_interleave(q.shape[1] // scale.shape[1], dim=1)


def ordered(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which columns are rounded, and the factor of the inverse in that order."""
    order = torch.argsort(inverse.diagonal())
    return order, torch.linalg.cholesky(inverse[order[:, None], order], upper=True)


def test_moments_are_those_of_all_inputs_together() -> None:
    _, x, moments = skewed()
    torch.testing.assert_close(moments.second, x.T @ x, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(moments.mean, x.abs().mean(0))


def test_what_is_taken_from_the_moments_is_nobody_elses() -> None:
    """The largest matrices of all are gone from memory when who took them lets go of them."""
    _, _, moments = skewed()
    for taken in (moments.take_second(), moments.take_drift()):
        assert taken.shape == (128, 128)
    assert moments.second.untyped_storage().nbytes() == 0
    assert moments.drift.untyped_storage().nbytes() == 0


def test_damping_is_undone() -> None:
    _, _, moments = skewed()
    before = moments.second.clone()
    with moments.damped() as second:
        assert second.diagonal().min() > before.diagonal().min()
        torch.linalg.cholesky(second)
    assert torch.equal(moments.second, before)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_step_lowers_the_error_of_the_outputs(seed: int) -> None:
    weight, x, moments = skewed(seed)
    plain = meant(*quantize_int4(weight, 64, torch.float32))
    with moments.damped() as damped:
        second = damped.clone()
    inverse = torch.linalg.inv(second)
    importance = 1 / inverse.diagonal()
    factor = search_prequant(weight, moments.mean, importance, 64, torch.float32)
    scaled = weight / factor
    awq = meant(*quantize_int4(scaled, 64, torch.float32)) * factor
    scale = search_scale(weight, factor, importance, 64, torch.float32)
    rounded = (scaled / scale.repeat_interleave(64, 1)).round().clamp(-8, 7)
    clipped = meant(rounded, scale) * factor
    q = round_int4(weight, scale, factor, *ordered(inverse))
    fitted = fit_prequant(weight, Int4Weight(q, scale), factor, second)
    compensated, refitted = meant(q, scale) * factor, meant(q, scale) * fitted
    errors = [output_error(weight, w, x) for w in (plain, awq, clipped, compensated, refitted)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0], errors


def test_the_whole_search_is_its_steps_and_keeps_the_format() -> None:
    weight, x, moments = skewed()
    linear = quantize_awq(weight, moments, 64, torch.bfloat16)
    q, scale = linear.weight
    assert q.dtype == torch.int8 and -8 <= q.min() and q.max() <= 7
    assert scale.dtype == linear.prequant.dtype == torch.bfloat16
    assert scale.shape == (96, 2) and linear.prequant.shape == (128,)
    wanted = meant(q, scale) * linear.prequant.float()
    assert torch.equal(linear.dequantized(), wanted)
    plain = meant(*quantize_int4(weight, 64, torch.bfloat16))
    assert output_error(weight, wanted, x) < 0.5 * output_error(weight, plain, x)


def test_rounding_without_correlation_is_plain_rounding() -> None:
    weight, _, _ = skewed()
    q, scale = quantize_int4(weight, 64, torch.float32)
    assert torch.equal(round_int4(weight, scale, torch.ones(128), *ordered(torch.eye(128))), q)


def test_what_earlier_layers_lost_is_made_up_for() -> None:
    """Inputs that came out a half too small everywhere: the weight grows as much."""
    weight, x, _ = skewed()
    knowing, unknowing = InputMoments(128), InputMoments(128)
    knowing.add(x / 1.5, x)
    unknowing.add(x / 1.5)
    aware = quantize_awq(weight, knowing, 64, torch.float32).dequantized()
    unaware = quantize_awq(weight, unknowing, 64, torch.float32).dequantized()
    lost = [float((x @ weight.T - x / 1.5 @ w.T).square().sum()) for w in (unaware, aware)]
    assert lost[1] < 0.2 * lost[0], lost


def test_dead_channels_and_zero_weights_are_no_trouble() -> None:
    weight = torch.zeros(32, 128)
    moments = InputMoments(128)
    moments.add(torch.zeros(4, 128))
    linear = quantize_awq(weight, moments, 64, torch.float16)
    assert isinstance(linear.weight, Int4Weight) and not linear.dequantized().any()


def test_what_is_written_is_what_the_search_found(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tmp_path: Path
) -> None:
    """The engine's tensors against a second run of the search, layer by layer."""
    settings = {"quant": "int4_awq", "group_size": 64, "calib_samples": 2, "calib_length": 64}
    path = make_engine(**settings, tp=2, until="compile")
    plan = make_plan(load_settings(settings), tiny_source)
    sequences = calibration_sequences(tiny_source.path, 2, 64, tiny_source.bos_token_id)
    saved = SavedActivations(tmp_path / "a")
    awq = LayerwiseAwq(plan.config, ReferenceModel(plan.config, tiny_source), sequences, saved)
    weights = CheckpointWeights(path, read_config(path))
    for layer in range(2):
        found = weights(f"transformer.layers.{layer}.")
        for name, tensor in awq(layer).items():
            assert torch.equal(found[name], tensor), name
        truth = tiny_source.tensors.read(f"model.layers.{layer}.mlp.down_proj.weight").float()
        back = dequantize_int4(found["mlp.proj.weight"], found["mlp.proj.weights_scaling_factor"])
        back = back * found["mlp.proj.prequant_scaling_factor"].float()
        assert float((back - truth).norm() / truth.norm()) < 0.25
        factors = [found[f"mlp.{name}.prequant_scaling_factor"] for name in ("fc", "gate")]
        assert torch.equal(*factors), "fc and gate run as one product"


def test_calibration_texts_take_turns() -> None:
    texts = passages()
    assert "harbour" in texts[0] and "harbour" not in texts[1] and len(texts) > 30
