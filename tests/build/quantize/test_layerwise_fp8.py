"""FP8 by layers: what compensated rounding gains, and what is written of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from enginehouse.build.forms.quantization import quantize_fp8
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize.activations import SavedActivations
from enginehouse.build.quantize.calibration import calibration_sequences
from enginehouse.build.quantize.compensation import InputMoments
from enginehouse.build.quantize.layerwise_fp8 import LayerwiseFp8, quantize_fp8_compensated
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import to_fp8
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """A weight [96, 160], and inputs whose channels hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(160, 160, generator=generator) * 0.1 + torch.eye(160)
    x = torch.randn(700, 160, generator=generator) @ mixing
    x[:, ::17] *= 20
    return torch.randn(96, 160, generator=generator), x


def moments_of(x: Tensor) -> InputMoments:
    moments = InputMoments(x.shape[1])
    moments.add(x)
    return moments


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_compensated_rounding_loses_less_than_the_nearest(seed: int) -> None:
    weight, x = drawn(seed)
    scale = weight.abs().amax().view(1) / 448
    found = quantize_fp8_compensated(weight, scale, moments_of(x))
    nearest = to_fp8(weight / scale)
    errors = [float((x @ (weight - q.float() * scale).T).square().sum()) for q in (found, nearest)]
    assert found.dtype == torch.float8_e4m3fn and found.shape == weight.shape
    assert errors[0] < 0.6 * errors[1], errors


def test_inputs_that_do_not_hang_together_give_the_nearest() -> None:
    weight, _ = drawn(0)
    moments = InputMoments(160)
    moments.second = torch.eye(160)
    scale = weight.abs().amax().view(1) / 448
    found = quantize_fp8_compensated(weight, scale, moments)
    assert torch.equal(found.float(), quantize_fp8(weight, float(scale)).float())


def test_channels_that_were_never_used_are_no_trouble() -> None:
    weight, x = drawn(0)
    scale = weight.abs().amax().view(1) / 448
    x[:, :40] = 0
    found = quantize_fp8_compensated(weight, scale, moments_of(x)).float()
    assert torch.equal(found[:, :40], to_fp8(weight[:, :40] / scale).float())
    zeros = quantize_fp8_compensated(weight, scale, moments_of(torch.zeros(4, 160))).float()
    assert torch.equal(zeros, to_fp8(weight / scale).float())


def test_what_is_written_is_what_the_walk_found(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, tmp_path: Path
) -> None:
    """With an excluded module, whose weight stays as it is; and not the nearest of each weight."""
    settings = {"quant": "fp8", "exclude": "*attention.dense", "calib_samples": 2}
    path = make_engine(**settings, calib_length=64, tp=2, until="compile")
    plan = make_plan(load_settings(settings), tiny_source)
    sequences = calibration_sequences(tiny_source.path, 2, 64, tiny_source.bos_token_id)
    reference = ReferenceModel(plan.config, tiny_source)
    walk = LayerwiseFp8(plan.config, reference, sequences, SavedActivations(tmp_path / "a"))
    weights = CheckpointWeights(path, read_config(path))
    for layer in range(2):
        prefix = f"transformer.layers.{layer}."
        found, truth, made = weights(prefix), reference.tensors(prefix), walk(layer)
        quantised = [module for module in MODULES if module != "attention.dense"]
        kinds = ("weight", "weights_scaling_factor", "activation_scaling_factor")
        assert made.keys() == {f"{module}.{kind}" for module in quantised for kind in kinds}
        for name, tensor in made.items():
            assert torch.equal(found[name].float(), tensor.float()), name
        assert "attention.dense.weights_scaling_factor" not in found
        for module in quantised:
            scale = float(made[f"{module}.weights_scaling_factor"])
            nearest = quantize_fp8(truth[f"{module}.weight"], scale).float()
            steps = (made[f"{module}.weight"].float() - nearest).abs()
            assert 0 < float((steps > 0).float().mean()) < 0.5, module
