"""One linear of each form, and a mixture, through the kernels and through torch in float32.

Inputs are numbers that bfloat16 holds and sums are of float32 in both: only their order differs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from enginehouse.build.forms.quantization import quantize_fp8_rowwise, quantize_int4
from enginehouse.runtime.checkpoint.packing import pack_int4, quantize_int8, to_fp8
from enginehouse.runtime.checkpoint.routing import Routing
from enginehouse.runtime.checkpoint.weights import expert_tensors, module_tensors
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import choose_instructions
from enginehouse.runtime.cpu.linear_forms import LinearWeights, gated, halves, linear_of
from enginehouse.runtime.cpu.packed_linear import array_of, packed_linear
from enginehouse.runtime.cpu.structures import FORMS, INPUTS, PARTS
from enginehouse.runtime.torch.linear import make_linear
from enginehouse.runtime.torch.moe import ExpertMlp
from makers.cpp_compiler import compile_program, needs_compiler

pytestmark = needs_compiler
OUT = 48  # half a block more than one


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """float32, which bfloat16 holds."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().float()


def dense() -> dict[str, Tensor]:
    return {"weight": numbers(OUT, 240).bfloat16()}


def int4() -> dict[str, Tensor]:
    q, scale = quantize_int4(numbers(OUT, 256), 64, torch.bfloat16)
    return {"weight": pack_int4(q), "weights_scaling_factor": scale}


def int4_shifted() -> dict[str, Tensor]:
    """With zero points, and input factors that leave the inputs in bfloat16."""
    factor = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(64).bfloat16()
    return {**int4(), "zero": numbers(4, OUT, seed=2), "prequant_scaling_factor": factor}


def w4a8() -> dict[str, Tensor]:
    factor = (numbers(256, seed=3).abs() + 0.5).bfloat16()
    scales = {"weights_scaling_factor_2": 0.01, "activation_scaling_factor": 0.02}
    told = {name: torch.tensor([value]) for name, value in scales.items()}
    return {**int4(), "prequant_scaling_factor": factor, **told}


def int8() -> dict[str, Tensor]:
    q, scale = quantize_int8(numbers(OUT, 240).bfloat16())
    return {"weight": q, "per_channel_scale": scale}


def int8_of_ranks() -> dict[str, Tensor]:
    parts = [quantize_int8(part) for part in numbers(OUT, 256).bfloat16().chunk(2, dim=1)]
    scale = torch.stack([part.scale for part in parts], dim=1)
    return {"weight": torch.cat([part.q for part in parts], dim=1), "per_channel_scale": scale}


def fp8() -> dict[str, Tensor]:
    scales = {"weights_scaling_factor": 0.004, "activation_scaling_factor": 0.003}
    told = {name: torch.tensor([value]) for name, value in scales.items()}
    return {"weight": to_fp8(numbers(OUT, 240) / 0.004), **told}


def fp8_rowwise() -> dict[str, Tensor]:
    q, scale = quantize_fp8_rowwise(numbers(OUT, 240))
    return {"weight": q, "per_channel_scale": scale}


@pytest.fixture(scope="module", params=["best", "plain"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """products.cpp, for the best instruction set of this CPU and for any CPU."""
    instructions = choose_instructions() if request.param == "best" else "plain"
    made = tmp_path_factory.mktemp("products") / "products"
    source = Path(__file__).with_name("products.cpp")
    return compile_program(source, made, find_compiler(), instructions, "-O0")


def words(*numbers: int) -> bytes:
    return np.array(numbers, np.int32).tobytes()


def with_size(data: bytes) -> bytes:
    return words(len(data)) + data


def told(linear: LinearWeights) -> bytes:
    """A linear, as products.cpp reads it."""
    shape, arrays = packed_linear(linear)
    form, entering = FORMS.index(shape.form), INPUTS.index(shape.input)
    head = words(form, shape.inputs, shape.out, shape.group, entering, shape.narrow_scales)
    parts = (array_of(*arrays[part]).tobytes() if part in arrays else b"" for part in PARTS)
    return head + b"".join(with_size(part) for part in parts)


def run(program: str, head: bytes, x: Tensor) -> Tensor:
    data = words(*x.shape) + head + x.numpy().tobytes()
    done = subprocess.run([program], input=data, capture_output=True, check=True, timeout=60)
    return torch.tensor(np.frombuffer(done.stdout, np.float32)).view(len(x), -1)


def product(program: str, module: dict[str, Tensor], x: Tensor) -> Tensor:
    return run(program, words(*[0] * 12) + told(linear_of(module, "bf16")), x)[:, :OUT]


def in_bytes(x: Tensor, part: int) -> Tensor:
    """What the kernels round to: of each part 253 even steps from its least to its largest, which
    are whole steps from zero.
    """
    parts = x.double().unflatten(1, (-1, part))
    least, most = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = torch.maximum((most - least) / 253, (most + least).abs() / 64000)
    return ((parts / step).round() * step).flatten(1)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("made", [int4, int4_shifted, int8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17])
def test_a_product_of_bytes_is_that_of_what_is_rounded(
    program: str, made: Callable[[], dict[str, Tensor]], fine: bool, rows: int
) -> None:
    """Inputs around zero and far from it, alike in a whole part, and one alone that is large."""
    module = made()
    linear = linear_of(module, "int8", fine)
    inputs = linear.weight.shape[1]
    x = numbers(rows, inputs, seed=4)
    x[:, :64] += 40
    x[0, 64:128] = 0.75
    x[-1, 130] = 100
    wide = torch.nn.functional.pad(x, [0, -inputs % 64])
    factor = linear.factor.float() if linear.factor is not None else torch.ones(inputs)
    factor = torch.nn.functional.pad(factor, [0, -inputs % 64])
    rounded = in_bytes(wide * factor, 32 if fine else 64)[:, :inputs]
    assert linear.scale is not None
    q = linear.weight.double().unflatten(1, (linear.scale.shape[1], -1))
    weight = q * linear.scale.double().unsqueeze(-1)
    if linear.zero is not None:
        weight = weight + linear.zero.double().unsqueeze(-1)
    wanted = rounded @ weight.flatten(1).T
    found = run(program, words(*[0] * 12) + told(linear), x)[:, :OUT].double()
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_largest_nibbles_by_the_largest_bytes_are_summed_exactly(
    program: str, rows: int
) -> None:
    """Of each four inputs the first two, which a lane of 16 bits may sum, are the largest."""
    q, scale = quantize_int4(numbers(OUT, 256), 64, torch.bfloat16)
    largest = {"weight": pack_int4(q.fill_(7)), "weights_scaling_factor": scale.fill_(1)}
    linear = linear_of(largest, "int8", False)
    x = torch.tensor([1.0, 1.0, 0.1, -0.9]).repeat(rows, 64)
    wanted = 7 * in_bytes(x, 64).sum(1, keepdim=True)
    found = run(program, words(*[0] * 12) + told(linear), x)[:, :OUT].double()
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "module", [dense, int4, int4_shifted, w4a8, int8, int8_of_ranks, fp8, fp8_rowwise]
)
def test_a_product_of_each_form_is_torchs(
    program: str, module: Callable[[], dict[str, Tensor]]
) -> None:
    tensors = {**module(), "bias": numbers(OUT, seed=4)}
    x = numbers(13, tensors["weight"].shape[1], seed=5)
    truth = make_linear([tensors], torch.float32)(x)
    found = product(program, tensors, x)
    assert (found - truth).abs().max() < 2e-6 * truth.abs().max()
    assert torch.equal(product(program, tensors, x[:1]), found[:1])


EXPERTS, HIDDEN, INNER = 20, 80, 48


SCORING = {
    (False, False): "softmax",
    (True, False): "sigmoid",
    (True, True): "sigmoid of inputs",
}


def config_of(routing: Routing, limit: float) -> ModelConfig:
    """A model with such a mixture, and clamped gates where there is a limit."""
    moe = {
        "num_experts": routing.experts,
        "top_k": routing.chosen,
        "normalization_mode": 2 if routing.mixer_epsilon else int(routing.renormalize),
        "sparse_mixer_epsilon": routing.mixer_epsilon,
        "scoring": SCORING[routing.sigmoid, routing.scales_inputs],
        "device_limited_n_group": routing.groups,
        "device_limited_topk_group": routing.chosen_groups,
        "device_limited_routed_scaling_factor": routing.scale,
    }
    clamped = {"swiglu_limit": limit, "swiglu_alpha": 1.702} if limit else {}
    return ModelConfig(
        *("MixtralForCausalLM", "float32", 64, HIDDEN, 1, 4, 4, 20, INNER, 1e-5, 64),
        hidden_act="swiglu",
        extra={"moe": moe, **clamped},
    )


@pytest.mark.parametrize("has_more", [False, True], ids=["plain", "biases, corrections, clamped"])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(EXPERTS, 1, renormalize=False),
        Routing(EXPERTS, 2, renormalize=True),
        Routing(EXPERTS, 20, renormalize=False),
        Routing(EXPERTS, 2, False, sigmoid=True, group_best=2, scales_inputs=True),
        Routing(EXPERTS, 3, renormalize=False, groups=5, chosen_groups=2),
        Routing(EXPERTS, 2, False, mixer_epsilon=0.25),
        Routing(EXPERTS, 3, True, sigmoid=True, groups=4, chosen_groups=2, group_best=2, scale=2.5),
    ],
)
def test_a_mixture_chooses_and_adds_as_torch_does(
    program: str, routing: Routing, has_more: bool
) -> None:
    """What enters the second product is rounded to bfloat16, and in torch is not."""
    tensors = {
        "fc.weight": numbers(EXPERTS, 2 * INNER, HIDDEN, seed=7) / 8,
        "proj.weight": numbers(EXPERTS, HIDDEN, INNER, seed=8) / 8,
        "router.weight": numbers(EXPERTS, HIDDEN, seed=6),
    }
    if has_more:
        tensors["fc.bias"] = numbers(EXPERTS, 2 * INNER, seed=10)
        tensors["proj.bias"] = numbers(EXPERTS, HIDDEN, seed=11)
        tensors["router.bias"] = numbers(EXPERTS, seed=12)
        tensors["router.e_score_correction_bias"] = numbers(EXPERTS, seed=13) / 8
    limit = 50 if has_more else 0  # percent
    x = numbers(17, HIDDEN, seed=9) / 4
    truth = ExpertMlp(config_of(routing, limit / 100), tensors, torch.float32)(
        x, lambda name, linear, rows: linear(rows)
    )

    head = words(*(round(100 * n) if i in (7, 9) else int(n) for i, n in enumerate(routing)))
    head += words(INNER, limit)
    for name in ("weight", "bias", "e_score_correction_bias"):
        found = tensors.get(f"router.{name}")
        head += with_size(b"" if found is None else found.numpy().tobytes())
    for i in range(EXPERTS):
        fc, proj = (expert_tensors(module_tensors(tensors, name), i) for name in ("fc", "proj"))
        up, gate = halves(linear_of(fc, "bf16"))
        head += told(gated(gate, up)["fc_gate"]) + told(linear_of(proj, "bf16"))
    found = run(program, head, x)
    assert (found - truth).abs().max() < 0.01 * truth.abs().max()
    assert torch.equal(run(program, head, x[4:5]), found[4:5])
