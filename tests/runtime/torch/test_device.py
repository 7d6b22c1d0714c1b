"""The torch backend on a GPU's double: nothing on the wrong device, few waits, the CPU's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from torch import Tensor

from doubles.cuda_double import CUDA, GpuTensor, cuda_double
from enginehouse.build.forms.quantization import quantize_int4
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching.sampling import forbid
from enginehouse.runtime.checkpoint.packing import dequantize_int4, pack_int4, to_fp8
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.machine.device import (
    CPU,
    Products,
    choose_device,
    choose_dtype,
    native_products,
)
from enginehouse.runtime.request import Constraint, ConstraintKind, Request, SamplingParams
from enginehouse.runtime.torch.executor import TorchExecutor
from enginehouse.runtime.torch.linear import DenseLinear, Fp8Linear, Fp8RowwiseLinear, make_linear
from enginehouse.runtime.torch.packed_products import pair_nibbles, scaled_product
from makers.engines import EngineMaker, SourceMaker, build_engine

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 6, 7], list(range(40, 90)), [11], list(range(300, 417))]
FLOAT32 = ExecutorOptions(compute_dtype="float32", max_seq_len=256, kv_cache_gib=0.01)
SMALL = torch.Generator().manual_seed(3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=SMALL)


def answers(engine: Path, options: ExecutorOptions, work: list[Request]) -> dict[int, list[int]]:
    executor = open_executor(engine, options)
    try:
        return generate(executor, work)
    finally:
        executor.close()


def mixed(seed: int = 4) -> list[Request]:
    """Every kind of sampling, side by side."""
    params: list[dict[str, Any]] = [
        {"temperature": 0.0, "num_logprobs": 3, "repetition_penalty": 1.2, "min_tokens": 4},
        {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2, "num_logprobs": 0},
        {"top_k": 7, "min_p": 0.01, "logit_bias": ((9, 2.0), (11, -3.0)), "stop_token_ids": (3,)},
        {"temperature": 1.3},
    ]
    return [
        Request(i, prompt, SamplingParams(12, **{"seed": seed, "ignore_eos": True, **chosen}))
        for i, (prompt, chosen) in enumerate(zip(PROMPTS, params, strict=True))
    ]


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8_rowwise", "int4_awq", "w4a8_awq", "int8"])
def test_a_gpu_gives_the_cpus_tokens(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    engine = make_engine(quant=quant, until="compile")
    wanted = answers(engine, FLOAT32._replace(device="cpu"), mixed())
    with cuda_double(monkeypatch) as gpu:
        executor = open_executor(engine, FLOAT32)
        found = generate(executor, mixed())
        assert isinstance(executor, TorchExecutor) and executor.runner.device == CUDA
        assert all(isinstance(layer, GpuTensor) for layer in executor.runner.cache.layers)
        assert ("_scaled_mm" in gpu.products) is quant.startswith("fp8")
    assert found == wanted


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3", "mixtral", "qwen3", "phi3-longrope", "biased"]
)
def test_every_kind_of_layer_stays_on_the_gpu(
    family_source: SourceMaker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
) -> None:
    output = tmp_path_factory.mktemp(family) / "engine"
    engine = build_engine(family_source(family), output, quant="none", until="compile")
    work = [Request(i, [3 + i, 40, 7], SamplingParams(6, 0.0, ignore_eos=True)) for i in range(3)]
    options = FLOAT32._replace(max_seq_len=None)
    wanted = answers(engine, options._replace(device="cpu"), work)
    with cuda_double(monkeypatch):
        assert answers(engine, options, work) == wanted


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_a_rounded_cache_lies_on_the_gpu(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, kv_cache: str
) -> None:
    quant = "fp8" if kv_cache == "fp8" else "none"
    engine = make_engine(quant=quant, kv_cache_dtype=kv_cache, until="compile")
    wanted = answers(engine, FLOAT32._replace(device="cpu"), mixed())
    with cuda_double(monkeypatch):
        assert answers(engine, FLOAT32, mixed()) == wanted


def test_int4_runs_in_bfloat16_through_the_packed_product(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(quant="int4_awq", until="compile")
    with cuda_double(monkeypatch) as gpu:
        executor = open_executor(engine, FLOAT32._replace(compute_dtype="auto"))
        found = generate(executor, mixed())
        assert {len(tokens) for tokens in found.values()} <= set(range(1, 13))
        assert gpu.products.count("_convert_weight_to_int4pack") == 2 * 4  # layers, modules
        assert "_weight_int4pack_mm" in gpu.products


@pytest.mark.parametrize(
    ("params", "waits"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 1.0}, 1),
        ({"top_k": 20, "top_p": 0.9}, 1),
        ({"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.2}, 1),
        ({"top_p": 0.5}, 2),  # whether the leading candidates were enough
        ({"temperature": 0.0, "num_logprobs": 4}, 3),
    ],
)
def test_the_tokens_come_back_once_an_iteration(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], waits: int
) -> None:
    engine = make_engine(quant="fp8", until="compile")
    with cuda_double(monkeypatch) as gpu:
        executor = open_executor(engine, FLOAT32)
        for i in range(3):
            sampling = SamplingParams(20, **{"seed": i, "ignore_eos": True, **params})
            executor.submit(Request(i, PROMPTS[i], sampling))
        executor.poll()
        executor.poll()
        for _ in range(4):
            gpu.waits.clear()
            assert len(executor.poll()) == 3
            assert len(gpu.waits) == waits, gpu.waits


def test_a_constraint_is_followed_on_the_gpu(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(quant="none", until="compile")
    constraint = Constraint(ConstraintKind.REGEX, "[ab]{3}")
    work = [Request(1, [5, 6], SamplingParams(12, 0.0, constraint=constraint))]
    wanted = answers(engine, FLOAT32._replace(device="cpu"), work)
    with cuda_double(monkeypatch):
        assert answers(engine, FLOAT32, work) == wanted


def test_the_double_refuses_tensors_of_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with cuda_double(monkeypatch) as gpu:
        there = torch.zeros(3, device=CUDA)
        with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
            there + torch.ones(3)
        assert gpu.waits == [] and float(there[0]) == 0.0 and gpu.waits == ["__float__"]


def test_forbidden_tokens_are_xgrammars() -> None:
    bitmask = torch.randint(-(2**31), 2**31 - 1, (4,), dtype=torch.int32, generator=SMALL)
    logits = random(100)
    wanted = logits.clone()
    xgrammar.apply_token_bitmask_inplace(wanted[None], bitmask[None])
    forbid(logits, bitmask)
    assert torch.equal(logits, wanted) and logits.isinf().any() and logits.isfinite().any()


def test_the_scaled_product_is_the_product_of_the_rounded_factors() -> None:
    x, weight = to_fp8(random(5, 64) * 100), to_fp8(random(48, 64) * 100)
    wanted = x.double() @ weight.double().T
    found = scaled_product(x, weight)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-2 * 64)


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(("shape", "native"), [((48, 64), True), ((40, 64), False)])
def test_fp8_on_a_gpu_is_fp8_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], native: bool, rowwise: bool
) -> None:
    weight, bias, x = to_fp8(random(*shape) * 50), random(shape[0]), random(7, shape[1])
    module = {"weight": weight, "bias": bias}
    if rowwise:
        module["per_channel_scale"] = random(shape[0]).abs() / 50
    else:
        module["weights_scaling_factor"] = torch.tensor([0.02])
        module["activation_scaling_factor"] = torch.tensor([0.01])
    kind = Fp8RowwiseLinear if rowwise else Fp8Linear
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        wanted = make_linear([module], dtype)(x.to(dtype)).float()
        with cuda_double(monkeypatch):
            there = make_linear([{k: t.to(CUDA) for k, t in module.items()}], dtype)
            assert isinstance(there, kind)
            assert (there.weight.dtype == torch.float8_e4m3fn) is native
            found = there(x.to(dtype).to(CUDA)).to(CPU).float()
        assert (found - wanted).abs().max() <= close * wanted.abs().max()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("zero", [False, True])
def test_int4_on_a_gpu_is_the_dequantised_product(
    monkeypatch: pytest.MonkeyPatch, group_size: int, zero: bool
) -> None:
    q, scale = quantize_int4(random(24, 384), group_size, torch.bfloat16)
    module = {"weight": pack_int4(q), "weights_scaling_factor": scale}
    if zero:
        module["zero"] = (random(384 // group_size, 24) * 0.1).bfloat16()
    x = random(6, 384).bfloat16()
    weight = dequantize_int4(module["weight"], scale, module.get("zero"))
    wanted = x.float() @ weight.T
    with cuda_double(monkeypatch) as gpu:
        there = make_linear([{k: t.to(CUDA) for k, t in module.items()}], torch.bfloat16)
        found = there(x.to(CUDA)).to(CPU).float()
        assert gpu.products == ["_convert_weight_to_int4pack", "_weight_int4pack_mm"]
    assert (found - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_the_high_nibble_is_the_even_column() -> None:
    assert pair_nibbles(torch.tensor([[-8, 7, 1, -1]], dtype=torch.int8)).tolist() == [[0x0F, 0x97]]


def test_what_has_no_kernel_is_dequantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, scale = quantize_int4(random(24, 64), 32, torch.bfloat16)
    int4 = {"weight": pack_int4(q), "weights_scaling_factor": scale}
    int8 = {"weight": q, "per_channel_scale": random(24, 2)}  # cut over two ranks
    with cuda_double(monkeypatch, (7, 5)) as gpu:
        for module in (int4, int8):
            there = make_linear([{k: t.to(CUDA) for k, t in module.items()}], torch.float32)
            assert isinstance(there, DenseLinear) and isinstance(there.weight, GpuTensor)
        found = there(torch.eye(64, device=CUDA)).to(CPU).T
        assert gpu.products == []
    halves = [
        half.float() * int8["per_channel_scale"][:, i, None]
        for i, half in enumerate(q.chunk(2, dim=1))
    ]
    assert torch.equal(found, torch.cat(halves, dim=1))


@pytest.mark.parametrize(
    ("capability", "products", "dtype"),
    [
        ((7, 5), Products(fp8=False, int4=False, int8=False), torch.float32),
        ((8, 6), Products(fp8=False, int4=True, int8=False), torch.bfloat16),
        ((8, 9), Products(fp8=True, int4=True, int8=False), torch.bfloat16),
        ((12, 0), Products(fp8=True, int4=True, int8=False), torch.bfloat16),
    ],
)
def test_a_gpu_multiplies_what_its_generation_can(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    products: Products,
    dtype: torch.dtype,
) -> None:
    with cuda_double(monkeypatch, capability):
        assert native_products(CUDA, torch.bfloat16) == products
        assert not native_products(CUDA, torch.float32).int4
        assert choose_dtype("auto", CUDA) is dtype and choose_device("auto") == CUDA
        assert choose_device("cpu") == CPU


def test_a_gpus_memory_bounds_its_cache(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, options = make_engine(until="compile"), ExecutorOptions(compute_dtype="float32")
    bytes_per_block = 2 * 2 * 4 * 32 * 4 * 16  # k and v, layers, heads, head size, float32, tokens
    with cuda_double(monkeypatch, free=200 * bytes_per_block * 5 // 3 + 8):
        assert open_executor(engine, options).info.num_kv_blocks == 200


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(EngineError, match="finds no GPU; install .* or ask for cpu"):
        choose_device("cuda")
    with pytest.raises(EngineError, match="device 'tpu'; wanted auto, cpu or cuda"):
        choose_device("tpu")
