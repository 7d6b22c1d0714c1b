"""How far layers are said to have moved: against the stored weights read back, and against
transformers' own model that is given them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize.calibration import calibration_sequences
from enginehouse.build.quantize.layer_errors import STATES, WEIGHTS, ErrorLog, ErrorSum, LayerErrors
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import unpack_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config, read_manifest
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def stored(weights: dict[str, Tensor], module: str) -> Tensor:
    """float32 [out, in] of what an engine holds, in int4, fp8 or fp8_rowwise."""
    weight = weights[f"{module}.weight"]
    if f"{module}.per_channel_scale" in weights:
        return weight.float() * weights[f"{module}.per_channel_scale"].view(-1, 1)
    scale = weights[f"{module}.weights_scaling_factor"].float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale
    q = unpack_int4(weight).float()
    return (q.view(len(q), scale.shape[1], -1) * scale.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("quant", ["int4", "fp8_rowwise"])
def test_of_weights_each_layers_is_that_of_what_was_stored(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker, quant: str
) -> None:
    path = make_engine(quant=quant, tp=2, until="compile")
    record = read_manifest(path).build
    assert record is not None and record.errors_of == WEIGHTS
    plan = make_plan(load_settings({"quant": quant}), tiny_source)
    reference = ReferenceModel(plan.config, tiny_source)
    weights = CheckpointWeights(path, read_config(path))
    found = dict(record.errors)
    for layer in range(2):
        prefix = f"transformer.layers.{layer}."
        held, truth = weights(prefix), reference.tensors(prefix)
        error = whole = 0.0
        for module in MODULES:
            true = truth[f"{module}.weight"].float()
            error += float((stored(held, module) - true).square().sum())
            whole += float(true.square().sum())
        # every eighth row stands for all
        assert found.pop(layer) == pytest.approx(math.sqrt(error / whole), rel=0.05)
    assert not found


def test_of_states_each_layers_is_that_of_transformers_with_the_stored_weights(
    tiny_source: SourceCheckpoint, make_engine: EngineMaker
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_engine(quant="fp8", until="compile")
    record = read_manifest(path).build
    assert record is not None and record.errors_of == STATES
    weights = CheckpointWeights(path, read_config(path))
    sequences = calibration_sequences(tiny_source.path, 4, 64, tiny_source.bos_token_id)
    before = AutoModelForCausalLM.from_pretrained(tiny_source.path, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tiny_source.path, dtype=torch.float32)
    for number, layer in enumerate(after.model.layers):
        held = weights(f"transformer.layers.{number}.")
        q, k, v = stored(held, "attention.qkv").split(
            [len(getattr(layer.self_attn, f"{name}_proj").weight) for name in "qkv"]
        )
        attention, mlp = layer.self_attn, layer.mlp
        for linear, weight in (
            *zip((attention.q_proj, attention.k_proj, attention.v_proj), (q, k, v), strict=True),
            (attention.o_proj, stored(held, "attention.dense")),
            (mlp.gate_proj, stored(held, "mlp.fc")),
            (mlp.up_proj, stored(held, "mlp.gate")),
            (mlp.down_proj, stored(held, "mlp.proj")),
        ):
            linear.weight = nn.Parameter(weight)
    ratios: dict[int, list[Tensor]] = {}
    for ids in sequences:
        truth, found = states(before, ids), states(after, ids)
        for number, (true, other) in enumerate(zip(truth, found, strict=True)):
            ratios.setdefault(number, []).append((other - true).norm(dim=-1) / true.norm(dim=-1))
    for number, error in record.errors:
        wanted = float(torch.cat(ratios.pop(number)).square().mean().sqrt())
        assert error == pytest.approx(wanted, rel=1e-3)
    assert not ratios


def states(model: Any, ids: Tensor) -> list[Tensor]:
    """What leaves each layer, [tokens, hidden]."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, given: seen.append(given[0]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(ids.view(1, -1))
    for hook in hooks:
        hook.remove()
    return [one.reshape(-1, one.shape[-1]) for one in seen]


def test_powers_of_two_and_blocks_at_the_end_are_read_as_they_are() -> None:
    weight = torch.randn(16, 160)
    seen = ErrorSum()
    seen.see(weight, weight / 4, torch.full((16, 5), 129, dtype=torch.uint8), 32)
    assert seen.error == 0 and seen.whole == pytest.approx(float(weight[::8].square().sum()))
    seen.see(weight, weight / 2, torch.full((16, 2), 2.0), 128)
    assert seen.error == 0


def test_a_log_goes_on_after_an_interruption(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path / "errors.jsonl")
    assert log.read() is None
    log.add(WEIGHTS, 1, "a", 4.0, 100.0)
    log.add(WEIGHTS, 1, "b", 5.0, 100.0)
    with (tmp_path / "errors.jsonl").open("a", encoding="utf-8") as file:
        file.write('["the layer')
    again = ErrorLog(tmp_path / "errors.jsonl")
    assert again.read() == LayerErrors(WEIGHTS, {1: math.sqrt(9 / 200)})
    again.add(WEIGHTS, 0, "a", 1.0, 1.0)  # behind the line that was cut off
    again.add(WEIGHTS, 1, "b", 0.0, 100.0)  # done once more
    found = again.read()
    assert found is not None and found.errors[1] == math.sqrt(4 / 200)
