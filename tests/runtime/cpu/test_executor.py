"""The compiled kernels against torch in float32 on the same rank files, and against themselves."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.build.plan.footprint import kv_bytes_per_token
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.batching.sampling_state import SamplingState
from enginehouse.runtime.batching.sequence import Chunk, Sequence
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.cpu.compiler import compiled_library
from enginehouse.runtime.cpu.executor import CpuExecutor, CpuRunner, text_logits
from enginehouse.runtime.cpu.instructions import (
    INSTRUCTIONS,
    available,
    choose_instructions,
    cpu_words,
)
from enginehouse.runtime.cpu.packed_file import LAYOUT, PACKED, PackedFile
from enginehouse.runtime.cpu.packing import pack_engine
from enginehouse.runtime.engine import read_engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Constraint, ConstraintKind, Request, SamplingParams
from enginehouse.runtime.torch.attention import PagedKVCache
from enginehouse.runtime.torch.decoder import CausalAttention, Decoder, causal_attention
from makers.cpp_compiler import COMPILERS, choose_compiler, compile_quickly, needs_compiler
from makers.engines import EngineMaker, SourceMaker, build_engine, engine_maker
from makers.family_models import (
    FAMILIES,
    LATENTS,
    MIXTURES,
    OF_ALL_KINDS,
    OF_OWN_LAYERS,
    save_family,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("one_thread")]
# Of families whose norms, or choice of experts, make much of a little rounding in a few rows.
JUMPY = [*sorted(MIXTURES), "qwen3.5"]
DENSE = [name for name in FAMILIES if name not in JUMPY]
# Longer than every window and than longrope's pretrained length; none a multiple of a cache unit.
PROMPT = [7 * i % 500 + 3 for i in range(83)]
OTHERS = [[5, 6, 7], [9] * 17, list(range(40, 75))]
OPTIONS = ExecutorOptions(max_seq_len=128, max_num_tokens=160, num_threads=1)
GREEDY = SamplingParams(10, temperature=0.0, ignore_eos=True)
# Of the largest logit, behind two layers: activations, keys and values are rounded to 8 bits of
# mantissa; or activations to 8 bits between the least and the largest of 32.
CLOSE = {"bf16": 0.02, "int8": 0.04}
# Or to e4m3, where what lies near the middle of two numbers may go to either: test_products.py has
# the products alone.
CLOSE_IN_E4M3 = 0.15
CLOSE_IN_BYTES = 0.05  # keys and values: what lies near the middle of two bytes may go to either
FORMS = {
    "none": {"quant": "none", "cpu_activations": "bf16"},
    "none-int8": {"quant": "none", "cpu_activations": "int8"},  # the head alone
    "int4": {"quant": "int4", "group_size": 64, "cpu_activations": "bf16"},
    "int4-int8": {"quant": "int4", "group_size": 64, "cpu_activations": "int8"},
}
BYTES = {
    "int8": {"quant": "int8", "cpu_activations": "bf16"},
    "int8-int8": {"quant": "int8", "cpu_activations": "int8"},
    "fp8": {"quant": "fp8", "cpu_activations": "bf16"},
    "fp8_rowwise": {"quant": "fp8_rowwise", "cpu_activations": "bf16"},
    "w4a8_awq": {"quant": "w4a8_awq", "cpu_activations": "bf16"},
}
KEPT_INT8 = {**FORMS["none"], "kv_cache_dtype": "int8"}
ODD_HEADS = {"head_dim": 20, "global_head_dim": 44}
ODD_INPUTS = {"hidden_size_per_layer_input": 12, "intermediate_size": 72}
ODD_LATENTS = {"q_lora_rank": 36, "kv_lora_rank": 40, "qk_nope_head_dim": 20, "v_head_dim": 10}


@pytest.fixture(scope="module")
def engine(family_source: SourceMaker, tmp_path_factory: pytest.TempPathFactory) -> EngineMaker:
    choices: dict[str, Any] = {"dtype": "bfloat16", "until": "compile", "backend": "cpu"}
    return engine_maker(family_source, tmp_path_factory.mktemp("engines"), **choices)


def runner_of(
    path: Path, options: ExecutorOptions = OPTIONS, instructions: str | None = None
) -> CpuRunner:
    return CpuRunner(read_engine(path), options, instructions)


def sequence(runner: CpuRunner, ids: list[int], number: int = 0) -> Sequence:
    state = SamplingState(GREEDY, ids)
    made = Sequence(Request(number, ids, GREEDY), state, list(ids))
    cached = runner.memory.admit(made, False)
    assert cached is not None
    made.num_computed = cached
    return made


def no_scores(rows: object, logits: object) -> None:
    raise AssertionError("no scores were asked for")


def logits_of(runner: CpuRunner, rows: range) -> Tensor:
    """float32 [rows, vocab_size]: a copy of those of the last step."""
    runner.model.logits(rows)
    return torch.tensor(runner.model.values)


def logits_alone(runner: CpuRunner, ids: list[int], cuts: tuple[int, ...] = ()) -> Tensor:
    """float32 [tokens, vocab_size]: the prompt's in chunks that end at cuts."""
    one = sequence(runner, ids)
    found = []
    for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
        runner.compute([Chunk(one, start, end - start)], no_scores)
        found.append(logits_of(runner, range(end - start)))
    runner.memory.release(one)
    return torch.cat(found)


def logits_of_torch(
    path: Path, ids: list[int], weights: type[CheckpointWeights] = CheckpointWeights
) -> Tensor:
    """The reference: the same weights, in float32; keys and values rounded as a cache's are."""
    config = read_engine(path).config
    stored = weights(path, config)
    model = Decoder(config, stored, torch.float32, 128)
    cache = PagedKVCache(config, 1, 16, torch.float32, stored.kv_scales())

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        k, v = (cache.round_trip(layer, values) for values in (k, v))
        return causal_attention(layer, q, k, v, rule)

    positions = torch.arange(len(ids))
    return model.logits(
        model.hidden_states(torch.tensor(ids), positions, CausalAttention(attention))
    )


def assert_close(path: Path, found: Tensor, truth: Tensor) -> None:
    choices = read_engine(path).manifest.choices
    in_e4m3 = choices["quant"] in ("fp8", "fp8_rowwise", "w4a8_awq")
    close = CLOSE_IN_E4M3 if in_e4m3 else CLOSE[choices["cpu_activations"]]
    assert (found - truth).abs().max() < grown(path, close) * truth.abs().max()


def grown(path: Path, close: float) -> float:
    """Behind an engine's layers: what each rounds by itself adds up as the root of their number."""
    return close * math.sqrt(read_engine(path).config.num_hidden_layers / 2)


# Every family as it is and in bytes, some in the other forms too.
DENSE_IN_FORMS = [
    *((name, form) for name in [*DENSE, "biased"] for form in ("none", "int4-int8")),
    *((name, form) for name in OF_ALL_KINDS if name in DENSE for form in ("none-int8", "int4")),
]


@pytest.mark.parametrize(("name", "form"), DENSE_IN_FORMS)
def test_logits_are_those_of_torch_in_float32(engine: EngineMaker, name: str, form: str) -> None:
    path = engine(name, **FORMS[form])
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


def test_a_text_has_the_logits_of_its_prompt(engine: EngineMaker) -> None:
    runner = runner_of(engine("llama", **FORMS["int4-int8"]), OPTIONS._replace(max_num_tokens=16))
    free = runner.memory.num_free
    found = torch.from_numpy(text_logits(runner, PROMPT))
    assert torch.equal(found, logits_alone(runner, PROMPT, tuple(range(16, 83, 16))))
    assert runner.memory.num_free == free


def said_to_keep_fp8(path: Path, folder: Path) -> Path:
    """An engine with an INT8 cache, called FP8: a plan makes those of FP8 weights only."""
    copy = Path(shutil.copytree(path, folder / path.name))
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"INT8"', '"FP8" '))  # as long as it was
    pack_engine(copy, read_engine(copy).config, 128, "bf16", copy / PACKED)
    return copy


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        *((name, "FP8") for name in ("llama", "gemma2", "youtu", "gemma4", "gemma3n")),
        *((name, "INT8") for name in ("llama", "gemma2", "youtu", "gemma4", "gemma3n")),
        ("gemma4-small", "INT8"),  # in FP8 torch's own bfloat16 is 13 % from its float32
    ],
)
def test_keys_and_values_are_kept_in_bytes(
    engine: EngineMaker, name: str, algo: str, tmp_path: Path
) -> None:
    path = engine(name, **KEPT_INT8)
    path = said_to_keep_fp8(path, tmp_path) if algo == "FP8" else path
    truth = logits_of_torch(path, PROMPT)
    found = logits_alone(runner_of(path), PROMPT)
    assert (found - truth).abs().max() < grown(path, CLOSE_IN_BYTES) * truth.abs().max()


IN_BYTES = [
    *((name, form) for name in ("biased", "gemma2", "phi4-mini", "qwen3") for form in BYTES),
    *((name, form) for name in ("gemma4", "gemma3n") for form in BYTES),
    *(("gemma4-small", form) for form in ("int8", "int8-int8")),  # e4m3 is 14 % of torch's own
    # Its queries' 64 latents are no group of 128.
    *(("youtu", form) for form in BYTES if form != "w4a8_awq"),
]


@pytest.mark.parametrize(("name", "form"), IN_BYTES)
def test_forms_of_one_byte_are_run(engine: EngineMaker, name: str, form: str) -> None:
    """Biases, GELU, soft caps, fc that holds the gate, norms of heads, latents."""
    path = engine(name, **BYTES[form])
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


JUMPY_IN_FORMS = [
    *((name, form) for name in JUMPY for form in ("none", "int4-int8")),
    *((name, "int4") for name in ("gpt-oss", "dots1", "deepseek-v3", "qwen3.5", "gemma4-moe")),
    ("qwen3.5", "int8-int8"),
    *(
        (name, form)
        for name in (
            *("gpt-oss", "dots1", "deepseek-v3", "mixtral", "qwen3-moe", "qwen3.5"),
            "gemma4-moe",
        )
        for form in ("none-int8", "fp8")
    ),
]


@pytest.mark.parametrize(("name", "form"), JUMPY_IN_FORMS)
def test_mixtures_of_experts_and_states_are_run(engine: EngineMaker, name: str, form: str) -> None:
    """Most rows are close; of two experts that a row likes nearly alike it may get the other, and
    those behind it see that; what a state gives may be next to nothing, which its norm makes large.
    test_products.py has the choice alone, and test_delta.py states.
    """
    choices = {**FORMS, **BYTES}[form]
    path = engine(name, **choices)
    found, truth = logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT)
    close = CLOSE_IN_E4M3 if form == "fp8" else CLOSE[choices["cpu_activations"]]
    assert (found - truth).abs().amax(dim=1).median() < close * truth.abs().max()


@pytest.mark.parametrize("form", ["int4", "int4-int8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "gemma4-moe"])
def test_where_every_expert_is_chosen_every_row_is_close(
    tmp_path: Path, name: str, form: str
) -> None:
    chosen = {"top_k_experts" if name == "gemma4-moe" else "num_experts_per_tok": 4}
    source = resolve_source(str(save_family(name, tmp_path / name, **chosen)), tmp_path)
    choices = {**FORMS[form], "dtype": "bfloat16", "until": "compile", "backend": "cpu"}
    path = build_engine(source, tmp_path / "engine", **choices)
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3", {"hidden_size": 100, "head_dim": 20, "intermediate_size": 72}),
        ("gemma3", {"hidden_size": 72, "head_dim": 36}),
        ("qwen3-moe", {"hidden_size": 100, "head_dim": 12, "moe_intermediate_size": 40}),
        ("phimoe-tied", {"hidden_size": 100, "head_dim": 20, "intermediate_size": 40}),
        ("youtu", {"hidden_size": 100, "head_dim": 12, "qk_rope_head_dim": 12, **ODD_LATENTS}),
        ("youtu", {"head_dim": 64, "qk_rope_head_dim": 64, "kv_lora_rank": 512}),  # DeepSeek-V3's
        ("gemma4-moe", {"hidden_size": 100, "moe_intermediate_size": 40, **ODD_HEADS}),
        ("gemma4-small", {"hidden_size": 100, "hidden_size_per_layer_input": 12, **ODD_HEADS}),
        ("gemma3n", {"hidden_size": 100, "head_dim": 20, "laurel_rank": 12, **ODD_INPUTS}),
    ],
)
def test_sizes_that_are_no_whole_vectors_are_run(
    tmp_path: Path, name: str, sizes: dict[str, int], kept: str
) -> None:
    source = resolve_source(str(save_family(name, tmp_path / name, **sizes)), tmp_path)
    choices = {**FORMS["none"], "dtype": "bfloat16", "until": "compile", "backend": "cpu"}
    path = build_engine(source, tmp_path / "engine", **choices, kv_cache_dtype=kept)
    found, truth = logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT)
    close = grown(path, CLOSE["bf16"] if kept == "auto" else CLOSE_IN_BYTES)
    assert (found - truth).abs().amax(dim=1).median() < close * truth.abs().max()
    assert torch.equal(logits_alone(runner_of(path), PROMPT, (1, 17, 40)), found)


def test_ranks_of_int8_have_scales_of_their_own(engine: EngineMaker) -> None:
    path = engine("llama", **BYTES["int8-int8"], tp=2)
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


def test_a_short_context_turns_by_longropes_short_factors(engine: EngineMaker) -> None:
    path = engine("phi3-longrope", quant="none")
    found = logits_alone(runner_of(path), PROMPT[:30])
    assert_close(path, found, logits_of_torch(path, PROMPT[:30]))


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_input_factors_and_both_sizes_of_group_are_run(
    make_engine: EngineMaker, group_size: int, activations: str
) -> None:
    form = {"quant": "int4_awq", "group_size": group_size, "cpu_activations": activations}
    path = make_engine(**form, backend="cpu", until="compile")
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["youtu", "gemma4", "gemma3n"])
def test_input_factors_are_run_in_other_layers(
    engine: EngineMaker, name: str, activations: str
) -> None:
    """Of latents; of layers that read others' keys, and whose gates stand apart."""
    path = engine(name, quant="int4_awq", cpu_activations=activations)
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


class WithZeros(CheckpointWeights):
    """Rank files whose 4-bit linears have zero points too, as some sources have them."""

    def __call__(self, prefix: str) -> dict[str, Tensor]:
        tensors = super().__call__(prefix)
        draws = torch.Generator().manual_seed(3)
        for name in sorted(tensors):
            module, _, word = name.rpartition(".")
            if word == "weights_scaling_factor":
                scale = tensors[name].float().T  # [groups, out]
                tensors[f"{module}.zero"] = torch.rand(scale.shape, generator=draws) * 4 * scale
        return tensors


class WithAnotherInput(CheckpointWeights):
    """Rank files whose gate saturates what enters it, and fc does not."""

    def __call__(self, prefix: str) -> dict[str, Tensor]:
        tensors = super().__call__(prefix)
        name = "mlp.gate.activation_scaling_factor"
        return {**tensors, name: tensors[name] / 40} if name in tensors else tensors


def packed_with(
    made: Path, weights: type[CheckpointWeights], folder: Path, patch: pytest.MonkeyPatch
) -> CpuRunner:
    """A runner of the engine with other weights than those of its rank files."""
    path = Path(shutil.copytree(made, folder / "engine"))
    engine = read_engine(path)  # before its size is no longer the manifest's
    activations = engine.manifest.choices["cpu_activations"]
    with patch.context() as other:
        other.setattr("enginehouse.runtime.cpu.packing.CheckpointWeights", weights)
        pack_engine(path, engine.config, 128, activations, path / PACKED)
    return CpuRunner(engine, OPTIONS)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_zero_points_are_added(
    engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, activations: str
) -> None:
    made = engine("qwen2", quant="int4", group_size=64, cpu_activations=activations)
    without = logits_alone(runner_of(made), PROMPT)
    found = logits_alone(packed_with(made, WithZeros, tmp_path, monkeypatch), PROMPT)
    truth = logits_of_torch(made, PROMPT, WithZeros)
    assert_close(made, found, truth)
    assert (found - without).abs().max() > 0.2 * truth.abs().max()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere"])
def test_a_gate_whose_input_is_rounded_otherwise_is_run_apart(
    engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    made = engine(name, **BYTES["fp8"], calib_samples=16, calib_length=512)  # scales that fit
    without = logits_alone(runner_of(made), PROMPT)
    found = logits_alone(packed_with(made, WithAnotherInput, tmp_path, monkeypatch), PROMPT)
    truth = logits_of_torch(made, PROMPT, WithAnotherInput)
    assert_close(made, found, truth)
    assert (found - without).abs().max() > 2 * CLOSE_IN_E4M3 * truth.abs().max()


def test_a_prompts_own_tokens_are_scored_as_its_logits_say(engine: EngineMaker) -> None:
    path = engine("llama", quant="none")
    executor = open_executor(path, OPTIONS._replace(max_num_tokens=16))
    executor.submit(Request(0, PROMPT, SamplingParams(1, 0.0, num_prompt_logprobs=0)))
    found: list[float] = []
    while executor.busy:
        for output in executor.poll():
            found += [told.logprob for told in output.prompt_logprobs or ()]
    logprobs = logits_alone(runner_of(path), PROMPT)[:-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).flatten()
    assert torch.allclose(torch.tensor(found), own, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3", "biased", "mixtral", "qwen3.5", *sorted(LATENTS | OF_OWN_LAYERS)],
)
def test_ranks_that_were_cut_are_merged_to_the_same_bits(engine: EngineMaker, name: str) -> None:
    one, four = (runner_of(engine(name, tp=n, pp=n)) for n in (1, 2))
    assert torch.equal(logits_alone(one, PROMPT), logits_alone(four, PROMPT))


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("llama", FORMS["int4"]),
        ("llama", FORMS["int4-int8"]),
        ("gemma2", FORMS["none"]),
        ("gemma2", KEPT_INT8),
        *(("gemma2", form) for form in BYTES.values()),
        ("mixtral", BYTES["fp8"]),
        *(("youtu", form) for form in (FORMS["none"], FORMS["int4-int8"], BYTES["fp8"], KEPT_INT8)),
        ("deepseek-v2-lite", FORMS["none"]),
        *(("qwen3.5", form) for form in (FORMS["none"], FORMS["int4-int8"], BYTES["fp8"])),
        ("qwen3-next", FORMS["none"]),
        *(("gemma4-small", form) for form in (FORMS["none"], FORMS["int4-int8"], KEPT_INT8)),
        *(("gemma4-moe", form) for form in (FORMS["none"], KEPT_INT8)),
        *(("gemma3n", form) for form in (FORMS["none"], BYTES["fp8"], KEPT_INT8)),
    ],
)
def test_logits_depend_on_their_sequence_alone(
    engine: EngineMaker, name: str, choices: dict[str, Any]
) -> None:
    """The same bits alone and beside others, in chunks, token by token, and on two threads."""
    path = engine(name, **choices)
    runner = runner_of(path)
    alone = logits_alone(runner, PROMPT)
    assert torch.equal(logits_alone(runner_of(path), PROMPT, (1, 2, 18, 50)), alone)
    assert torch.equal(logits_alone(runner_of(path), PROMPT, tuple(range(1, 83))), alone)

    two = runner_of(path, OPTIONS._replace(num_threads=2))
    assert torch.equal(logits_alone(two, PROMPT), alone)

    beside = runner_of(path, OPTIONS._replace(num_threads=2))
    sequences = [sequence(beside, ids, i) for i, ids in enumerate([*OTHERS, PROMPT])]
    chunks = [Chunk(each, 0, len(each.token_ids)) for each in sequences]
    beside.compute(chunks, no_scores)
    assert torch.equal(torch.tensor(beside.model.values)[-1], alone[-1])
    assert torch.equal(logits_of(beside, range(55, 55 + 83)), alone)


@pytest.mark.parametrize("name", ["llama", "deepseek-v3", "gemma4-small", "gemma3n"])
def test_a_prefix_that_is_shared_in_the_step_that_fills_it_gives_the_same_bits(
    engine: EngineMaker, name: str
) -> None:
    path = engine(name, quant="int4", group_size=64)
    alone = logits_alone(runner_of(path), PROMPT)[-1]
    for threads in (1, 2):
        runner = runner_of(path, OPTIONS._replace(num_threads=threads))
        first = sequence(runner, PROMPT)
        runner.memory.will_hold(first, len(PROMPT))
        second = sequence(runner, PROMPT, 1)
        assert second.num_computed == 80
        chunks = [Chunk(second, 80, 3), Chunk(first, 0, len(PROMPT))]
        runner.compute(chunks, no_scores)
        for logits in torch.tensor(runner.model.values):
            assert torch.equal(logits, alone)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        *(("llama", choices) for choices in (FORMS["none"], FORMS["int4-int8"], KEPT_INT8)),
        ("deepseek-v2-lite", FORMS["none"]),
        ("qwen3.5", FORMS["none"]),
        *((name, FORMS["none"]) for name in ("gemma4", "gemma4-small", "gemma3n")),
    ],
)
def test_what_a_used_block_held_leaves_no_trace(
    engine: EngineMaker, tmp_path: Path, name: str, choices: dict[str, Any]
) -> None:
    """Not even NaN, which times zero is NaN."""
    path = Path(shutil.copytree(engine(name, **choices), tmp_path / "engine"))
    alone = logits_alone(runner_of(path), PROMPT)
    embedding = PackedFile(path / PACKED)["embedding"].tobytes()
    row = len(embedding) // 512
    spoiled = embedding[: 11 * row] + b"\xff\x7f" * (row // 2) + embedding[12 * row :]
    packed = (path / PACKED).read_bytes()
    (path / PACKED).write_bytes(packed.replace(embedding, spoiled))
    assert 11 not in PROMPT
    runner = runner_of(path)
    for _ in range(8):
        assert logits_alone(runner, [11] * 127).isnan().all()
    assert torch.equal(logits_alone(runner, PROMPT, (1, 40)), alone)


def test_what_was_packed_in_another_layout_is_packed_anew(
    engine: EngineMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = Path(shutil.copytree(engine("llama", **FORMS["int4"]), tmp_path / "engine"))
    library = compiled_library(choose_instructions())
    monkeypatch.setenv("ENGINEHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("enginehouse.runtime.cpu.executor.compiled_library", lambda _: library)
    alone = logits_alone(runner_of(path), PROMPT)
    packed = (path / PACKED).read_bytes()
    ours = f'"layout\\":{LAYOUT}'.encode()
    theirs = packed.replace(ours, b'"layout\\":9').replace(b'"hidden', b'"h1dden')
    (path / PACKED).write_bytes(theirs)  # and says other things
    assert torch.equal(logits_alone(runner_of(path), PROMPT), alone)
    assert f"is packed in layout 9, and this reads {LAYOUT}" in caplog.text
    (kept,) = (tmp_path / "cache" / "packed").iterdir()
    whole = kept.stat()
    assert torch.equal(logits_alone(runner_of(path), PROMPT), alone)
    assert kept.stat() == whole, "what was packed is kept"
    kept.write_bytes(packed[:1000])
    assert torch.equal(logits_alone(runner_of(path), PROMPT), alone), "a damaged one is not"


@pytest.mark.parametrize("name", ["llama", "qwen3.5", "gemma4-small", "gemma3n"])
def test_the_loop_answers_each_as_it_answers_it_alone(engine: EngineMaker, name: str) -> None:
    path = engine(name, quant="int4", group_size=64)
    prompts = [PROMPT, *OTHERS]
    executor = open_executor(path, OPTIONS)
    assert isinstance(executor, CpuExecutor)
    together = generate(executor, [Request(i, ids, GREEDY) for i, ids in enumerate(prompts)])
    for i, ids in enumerate(prompts):
        alone = open_executor(path, OPTIONS._replace(max_num_tokens=16, deterministic=True))
        assert generate(alone, [Request(i, ids, GREEDY)]) == {i: together[i]}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("llama", form) for form in ("none", "int4", "int4-int8", "int8", "fp8_rowwise")),
        *((name, "none") for name in ("youtu", "gemma4-small", "gemma3n")),
    ],
)
def test_every_instruction_set_of_this_cpu_gives_the_logits(
    engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, instructions: str, name: str, form: str
) -> None:
    if instructions not in available(cpu_words()):
        pytest.skip(f"this CPU has no {instructions}")
    if instructions != choose_instructions():  # which all others are compiled for
        compile_quickly(monkeypatch)
    path = engine(name, **{**FORMS, **BYTES}[form])
    found = logits_alone(runner_of(path, instructions=instructions), PROMPT)
    assert_close(path, found, logits_of_torch(path, PROMPT))


@pytest.mark.parametrize("name", COMPILERS)
def test_every_compiler_of_this_machine_gives_the_logits(
    engine: EngineMaker, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ziglang as where there is no other: with nothing on PATH."""
    choose_compiler(name, monkeypatch, tmp_path)
    path = engine("llama", **FORMS["int4-int8"])
    assert_close(path, logits_alone(runner_of(path), PROMPT), logits_of_torch(path, PROMPT))


@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4-small", "gemma3n", "youtu"])
def test_a_block_takes_what_the_plan_says(engine: EngineMaker, name: str, kept: str) -> None:
    """Of layers that differ in their heads the sum; of one that reads another's keys nothing."""
    path = engine(name, **{**FORMS["none"], "kv_cache_dtype": kept})
    runner = runner_of(path)
    tokens = runner.memory.num_free * runner.block_size
    assert runner.kv_cache_bytes == tokens * kv_bytes_per_token(read_engine(path).config)


def test_the_kernels_say_where_their_time_goes(engine: EngineMaker) -> None:
    runner = runner_of(engine("llama", quant="int4"))
    assert set(runner.model.seconds().values()) == {0.0}
    began = time.perf_counter()
    logits_alone(runner, PROMPT)
    wall, first = time.perf_counter() - began, runner.model.seconds()
    assert min(first.values()) > 0 and sum(first.values()) < wall
    runner.model.logits([0])
    later = runner.model.seconds()
    grown = {name for name in first if later[name] > first[name]}
    assert grown == {"head", "rows"}  # no layer was computed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (OPTIONS._replace(compute_dtype="float32"), "compute_dtype=float32 is not yet run by"),
        (OPTIONS._replace(device="cuda"), "backend=cpu wants auto or cpu"),
        (OPTIONS._replace(speculative="ngram"), "speculative=ngram is of no use with linear"),
    ],
)
def test_options_that_are_not_run_are_refused(
    engine: EngineMaker, options: ExecutorOptions, sentence: str
) -> None:
    with pytest.raises(EngineError, match=sentence):
        open_executor(engine("qwen3.5", **FORMS["none"]), options)


WITHOUT_TORCH = """
import sys
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.host import process
from enginehouse.runtime.request import Request, SamplingParams
executor = open_executor(sys.argv[1], ExecutorOptions(num_threads=1, grammars_at_once=True))
params = SamplingParams(5, top_p=0.9, num_logprobs=2, num_prompt_logprobs=1, ignore_eos=True)
assert len(generate(executor, [Request(1, [5, 6, 7], params)])[1]) == 5
executor.close()
print(*sorted({"torch", "xgrammar", "transformers"} & sys.modules.keys()))
"""


def test_an_engine_is_opened_and_answers_without_torch(engine: EngineMaker) -> None:
    """Which takes a second and 200 MB; only a constraint needs it, for xgrammar."""
    path = engine("llama", quant="int4", group_size=64)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(path)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_a_constraint_is_followed(engine: EngineMaker) -> None:
    """And its compiler is started by it, not with the engine."""
    path = engine("llama", quant="none")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    choices = ["the fields and the river", "the bridge"]
    constraint = Constraint(ConstraintKind.CHOICE, json.dumps(choices))
    params = SamplingParams(30, seed=3, min_tokens=2, constraint=constraint)
    executor = open_executor(path, OPTIONS._replace(grammars_at_once=True))
    assert isinstance(executor, CpuExecutor) and executor.grammars._child is None
    free = Request(0, PROMPT, GREEDY)
    found = generate(executor, [free, Request(1, PROMPT, params)])
    executor.close()
    assert tokenizer.decode(found[1]) in choices
    assert found[0] == generate(open_executor(path, OPTIONS), [free])[0]
