"""INT4 groups with zero points: cut and merged by group and by row, multiplied as they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.hf_keys.config_values import read_json
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.runtime.checkpoint.packing import dequantize_int4, pack_int4
from enginehouse.runtime.checkpoint.sharding import merge_tensors, shard_tensor
from enginehouse.runtime.config import Mapping, ModelConfig
from enginehouse.runtime.torch.linear import make_linear
from makers.engines import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("zero") / "tiny")
    whole = model_config(read_json(path / "config.json"), "float16")
    return replace(
        whole, quantization=replace(QUANT_CONFIGS["int4"], group_size=GROUP, has_zero_point=True)
    )


def random_linear(out_features: int, in_features: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // GROUP
    q = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.rand(out_features, groups, generator=generator) * 0.01 + 0.005
    zero = torch.randint(-8, 9, (groups, out_features), generator=generator) * scale.T
    return {"weight": pack_int4(q), "weights_scaling_factor": scale, "zero": zero}


def by_hand(linear: dict[str, Tensor]) -> Tensor:
    """q * scale + zero, number by number."""
    packed, scale, zero = (linear[k] for k in ("weight", "weights_scaling_factor", "zero"))
    rows = []
    for r, row in enumerate(packed.tolist()):
        for half in (0, 1):
            nibbles = [(byte >> (4 * half)) & 0xF for byte in row]
            o = 2 * r + half
            rows.append(
                [
                    (n - 16 * (n > 7)) * float(scale[o, i // GROUP]) + float(zero[i // GROUP, o])
                    for i, n in enumerate(nibbles)
                ]
            )
    return torch.tensor(rows)


def test_dequantised_weights_are_q_times_scale_plus_zero() -> None:
    linear = random_linear(32, 128)
    found = dequantize_int4(linear["weight"], linear["weights_scaling_factor"], linear["zero"])
    torch.testing.assert_close(found, by_hand(linear))


@pytest.mark.parametrize("shapes", [[(64, 128)], [(32, 256), (48, 256)], [(20, 128)]])
def test_the_product_is_that_of_the_dequantised_weight(shapes: list[tuple[int, int]]) -> None:
    modules = [random_linear(*shape, seed=i) for i, shape in enumerate(shapes)]
    x = torch.randn(5, shapes[0][1], generator=torch.Generator().manual_seed(1))
    wanted = x @ torch.cat([by_hand(module) for module in modules]).T
    found = make_linear(modules, torch.float32)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("module", ["attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"])
def test_zeros_are_merged_to_what_was_cut(config: ModelConfig, module: str, tp: int) -> None:
    sizes = {"attention.qkv": (512, 256), "mlp.fc": (512, 256), "mlp.proj": (256, 512)}
    out_features, in_features = sizes.get(module, (256, 256))
    cut = config.with_mapping(Mapping(tp))
    name = f"transformer.layers.0.{module}.zero"
    groups = max(in_features // GROUP, 8)  # so that every tp cuts the axis of groups
    zero = torch.arange(groups * out_features).view(groups, out_features).half()
    parts = [shard_tensor(name, zero, cut, rank) for rank in range(tp)]
    if module in ("attention.dense", "mlp.proj"):
        assert all(part.shape == (groups // tp, out_features) for part in parts)
        assert torch.equal(torch.cat(parts), zero)
    else:
        assert all(part.shape[0] == groups for part in parts)
    assert torch.equal(merge_tensors(name, parts, cut), zero)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_multiplies_with_its_own_zeros(config: ModelConfig, tp: int) -> None:
    """Rank by rank: rows of a cut output stand one below the other, cut inputs add up."""
    cut = config.with_mapping(Mapping(tp))
    for module, shape in (("mlp.fc", (512, 256)), ("mlp.proj", (256, 512))):
        whole = random_linear(*shape)
        x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(2))
        names = {kind: f"transformer.layers.0.{module}.{kind}" for kind in whole}
        outputs = []
        for rank in range(tp):
            part = {k: shard_tensor(names[k], tensor, cut, rank) for k, tensor in whole.items()}
            piece = x if module == "mlp.fc" else x.chunk(tp, dim=1)[rank]
            outputs.append(make_linear([part], torch.float32)(piece))
        found = torch.cat(outputs, dim=1) if module == "mlp.fc" else sum(outputs, torch.zeros(1))
        torch.testing.assert_close(found, x @ by_hand(whole).T, rtol=1e-4, atol=1e-4)


def test_the_table_lists_zeros_untransposed_in_the_models_dtype(config: ModelConfig) -> None:
    table = output_tensors(config.with_mapping(Mapping(2)), 0, "float32")
    prefix = "transformer.layers.0."
    assert table[prefix + "attention.qkv.zero"] == ("float16", (4, 256))
    assert table[prefix + "mlp.proj.zero"] == ("float16", (4, 256))
    assert table[prefix + "mlp.fc.zero"] == ("float16", (4, 256))
    assert table[prefix + "mlp.proj.weights_scaling_factor"] == ("float32", (256, 4))
