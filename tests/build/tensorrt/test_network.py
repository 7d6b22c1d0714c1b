"""The network that TensorRT compiles, computed in torch: equal to the torch backend's decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doubles.network_runner import NetworkRunner
from enginehouse.build.forms.weight_forms import FP8_FORMS
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.checkpoint.packing import pack_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.tensorrt.inputs import transpose_int4
from enginehouse.runtime.torch.decoder import Decoder, causal_attention
from enginehouse.runtime.torch.linear import Fp8RowwiseLinear
from makers.engines import SourceMaker, build_engine, write_tiny_checkpoint
from makers.family_models import BEYOND_TENSORRT, FAMILIES, LLAMA3, MIXTURES

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [*sorted(FAMILIES.keys() - BEYOND_TENSORRT), "biased"]
FORMS = ("none", "int4", "fp8", "fp8_rowwise", "int8")
# Of these the linears, or what is summed over ranks, are others than a Llama's; of the other
# families every form has the very products of one of them.
UNLIKE = ("llama", "biased", "gemma2", "phi3", "arcee", "cohere", "olmo2")
CASES = [
    *((family, "none", 1) for family in OURS),
    *((family, "none", 2) for family in OURS),
    *((family, quant, 2) for family in UNLIKE for quant in FORMS[1:]),
    *((family, "int4_awq", 2) for family in ("llama", "phi3", "gemma2")),
    ("biased", "none", 4),
    ("llama", "int4", 4),
    ("mixtral", "fp8", 2),
    ("qwen2-moe", "fp8", 2),
    ("gpt-oss", "fp8", 2),  # experts with biases
    *(("youtu", quant, 2) for quant in (*FORMS[1:], "int4_awq")),  # latents
    ("deepseek-v3", "fp8", 2),
    ("llama4", "fp8", 2),  # experts whose inputs are scaled
    ("olmo2", "none", 4),  # norms over all heads, two ranks with the same key head
]
CONTEXT = 96
# Prompts of one batch, in chunks of 16; one ends with position 31, where a step of Llama 4's growth
# begins, as it counts from 1.
LENGTHS = (23, 41, 29, 9)
DECODES = 3


def prompts(vocab: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (n + DECODES,), generator=generator) for n in LENGTHS]


class CutInputs:
    """FP8 with a scale for each token, of a linear whose inputs are cut: every rank has its own."""

    def __init__(self, whole: Fp8RowwiseLinear, ranks: int) -> None:
        self.out_features = whole.out_features
        self.parts = []
        for rank, weight in enumerate(whole.weight.chunk(ranks, dim=1)):
            bias = whole.bias if rank == 0 else None
            self.parts.append(Fp8RowwiseLinear(weight, whole.scale, bias, weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        cut = x.chunk(len(self.parts), dim=-1)
        return sum((part(one) for part, one in zip(self.parts, cut, strict=True)), torch.zeros(()))


def torch_logits(engine: Path, dtype: torch.dtype) -> list[Tensor]:
    """Of the last prompt token and each decoded one: [1 + DECODES, vocab] for each sequence."""
    config = read_config(engine)
    model = Decoder(config, CheckpointWeights(engine, config), dtype, max_positions=CONTEXT)
    for layer in model.layers:
        owners: list[tuple[dict[str, Any], str]] = []
        if layer.attention is not None:
            owners.append((vars(layer.attention)["linears"], "attention.dense"))
        if layer.mlp is not None:
            owners.append((vars(layer.mlp), "proj"))
        for owner, name in owners:
            if isinstance(whole := owner[name], Fp8RowwiseLinear):
                owner[name] = CutInputs(whole, config.mapping.tp_size)
    found = []
    for ids in prompts(config.vocab_size):
        rows = []
        for end in range(len(ids) - DECODES, len(ids) + 1):
            hidden = model.hidden_states(ids[:end], torch.arange(end), causal_attention)
            rows.append(model.logits(hidden[-1:])[0])
        found.append(torch.stack(rows))
    return found


def errors(engine: Path, dtype: torch.dtype, **runner_options: Any) -> list[float]:
    """Each sequence's largest difference, in standard deviations of its logits."""
    runner = NetworkRunner(engine, CONTEXT, batch=len(LENGTHS), **runner_options)
    found = runner.logits(prompts(runner.config.vocab_size), DECODES, chunk=16)
    wanted = torch_logits(engine, dtype)
    pairs = zip(found, wanted, strict=True)
    return [float((ours - theirs).abs().max() / theirs.std()) for ours, theirs in pairs]


@pytest.mark.parametrize(("family", "quant", "tp"), CASES)
def test_the_network_answers_as_the_torch_backend(
    family: str, quant: str, tp: int, family_source: SourceMaker, tmp_path: Path
) -> None:
    """Prompts in chunks, of unequal lengths in one batch, then steps of one token.

    FP8: where a value lies on the edge between two of e4m3's, the last bit of float32 decides, and
    one such value moves a whole sequence by some hundredths. Most sequences have none.
    """
    settings = dict(dtype="float32", quant=quant, tp=tp, until="convert")
    engine = build_engine(family_source(family), tmp_path / "e", **settings)
    found = sorted(errors(engine, torch.float32))
    print(family, quant, tp, *(f"{error:.1e}" for error in found))
    assert found[0] < 1e-4
    assert found[-1] < (0.5 if quant in FP8_FORMS else 1e-4)


def test_llama_3s_rotary_scaling_reaches_the_network(tmp_path: Path) -> None:
    """The other scalings are the families'."""
    write_tiny_checkpoint(tmp_path / "in", rope_scaling=LLAMA3, dtype="float32")
    source = resolve_source(str(tmp_path / "in"), tmp_path)
    engine = build_engine(source, tmp_path / "e", dtype="float32", quant="none", until="convert")
    assert read_config(engine).rotary_scaling is not None
    assert max(errors(engine, torch.float32)) < 1e-4


@pytest.mark.parametrize("family", OURS)
def test_parts_one_after_another_answer_as_the_torch_backend(
    family: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """One layer in a part: a part's network runs each layer that is like its own."""
    quant = "none" if family in MIXTURES else "int4"
    settings = dict(dtype="float32", quant=quant, tp=2, until="convert")
    engine = build_engine(family_source(family), tmp_path / "e", **settings)
    assert max(errors(engine, torch.float32, plan_layers=1)) < 1e-4


@pytest.mark.parametrize("plan_layers", [None, 1])
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *(("llama", quant) for quant in (*FORMS, "int4_awq")),
        *(("mixtral", "fp8"), ("gpt-oss", "none")),
    ],
)
def test_baked_weights_answer_as_the_torch_backend(
    family: str, quant: str, plan_layers: int | None, family_source: SourceMaker, tmp_path: Path
) -> None:
    settings = dict(dtype="float32", quant=quant, until="convert")
    engine = build_engine(family_source(family), tmp_path / "e", **settings)
    found = errors(engine, torch.float32, plan_layers=plan_layers, baked=True)
    assert min(found) < 1e-4
    assert max(found) < (0.5 if quant in FP8_FORMS else 1e-4)


@pytest.mark.parametrize(
    ("family", "quant"),
    [*(("qwen2", quant) for quant in FORMS), ("gpt-oss", "none"), ("deepseek-v3", "none")],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_activations_stay_within_their_rounding(
    dtype: str, family: str, quant: str, family_source: SourceMaker, tmp_path: Path
) -> None:
    """Of two sequences at least: of a mixture one whose router has two experts nearly alike may be
    given the other, in bfloat16.
    """
    settings = dict(dtype=dtype, quant=quant, tp=2, until="convert")
    engine = build_engine(family_source(family), tmp_path / "e", **settings)
    found = sorted(errors(engine, torch.float32))
    print(dtype, family, quant, *(f"{error:.1e}" for error in found))
    assert found[1] < (0.4 if quant in FP8_FORMS else 0.1 if dtype == "bfloat16" else 0.02)


def test_a_byte_transpose_gives_tensorrts_nibbles() -> None:
    """Every byte value at every place: element [in, out] of TensorRT is q[out, in]."""
    q = torch.randint(-8, 8, (32, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    q[:16, :16] = torch.arange(-8, 8).repeat(16, 1)
    ours = transpose_int4(pack_int4(q))
    assert ours.shape == (48, 16) and ours.dtype == torch.uint8
    flat = ours.flatten().tolist()
    for k in range(48):
        for n in range(32):
            nibble = flat[(k * 32 + n) // 2] >> (4 * (n % 2)) & 15
            assert nibble - 16 * (nibble > 7) == int(q[n, k])
