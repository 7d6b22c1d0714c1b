"""Every family against transformers: the tensors read, the logits, the tokens, in every cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.hf_keys.hf_config import model_config
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.stages import describe_plan
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.cpu.executor import CpuRunner, text_logits
from enginehouse.runtime.engine import read_config, read_engine
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.torch.decoder import causal_attention
from enginehouse.runtime.torch.executor import TorchExecutor
from makers.cpp_compiler import needs_compiler
from makers.engines import EngineMaker, build_engine, engine_maker, train_tokenizer
from makers.family_models import (
    FAMILIES,
    LATENTS,
    MIXTURES,
    OF_ALL_KINDS,
    OF_OWN_LAYERS,
    SIZES,
    VOCAB,
    load_family,
    logits_of,
    save_family,
)

FLOAT32 = ExecutorOptions(compute_dtype="float32")
# Longer than every window and than longrope's pretrained length; one longer than an iteration.
PROMPTS = [list(range(40, 75)), [7 * i % 500 + 3 for i in range(80)]]
GREEDY = SamplingParams(10, temperature=0.0, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_family(name, tmp_path_factory.mktemp("family") / name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def engine(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> EngineMaker:
    return engine_maker(
        lambda name: open_checkpoint(checkpoint(name)),
        tmp_path_factory.mktemp("engines"),
        dtype="float32",
        until="compile",
    )


@pytest.fixture(scope="module")
def original(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    made: dict[str, PreTrainedModel] = {}

    def load(name: str) -> PreTrainedModel:
        if name not in made:
            made[name] = load_family(checkpoint(name))
        return made[name]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tables_name_what_transformers_saves(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    source = open_checkpoint(checkpoint(name))
    found = {key: info.shape for key, info in source.tensors.infos.items()}
    assert found == expected_shapes(model_config(source.config, "auto"))


# Every family in one piece and in four; some in two as well.
CUTS = [
    *((name, *cut) for name in FAMILIES for cut in ((1, 1), (2, 2))),
    *((name, *cut) for name in ("llama", "gemma3", "glm4-moe") for cut in ((1, 2), (2, 1))),
]


@pytest.mark.parametrize(("name", "tp", "pp"), CUTS)
def test_logits_and_greedy_tokens_equal_transformers(
    engine: EngineMaker, original: Callable[[str], PreTrainedModel], name: str, tp: int, pp: int
) -> None:
    executor = open_executor(engine(name, tp=tp, pp=pp), FLOAT32)
    assert isinstance(executor, TorchExecutor)
    together = generate(executor, [Request(i, prompt, GREEDY) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        ids = prompt + together[i]
        truth = logits_of(original(name), ids)
        assert together[i] == truth[len(prompt) - 1 : -1].argmax(-1).tolist()
        positions = torch.arange(len(ids))
        hidden = executor.runner.model.hidden_states(torch.tensor(ids), positions, causal_attention)
        found = executor.runner.model.logits(hidden)
        torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_over_cached_keys_equal_transformers(
    engine: EngineMaker, original: Callable[[str], PreTrainedModel], name: str
) -> None:
    executor = open_executor(engine(name, tp=1, pp=1), FLOAT32)
    assert isinstance(executor, TorchExecutor)
    compute, seen = executor.runner.model.logits, []
    executor.runner.model.logits = lambda hidden: seen.append(compute(hidden)) or seen[-1]
    prompt = PROMPTS[1]
    answer = generate(executor, [Request(0, prompt, GREEDY)])[0]
    truth = logits_of(original(name), prompt + answer)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.cat(seen), truth, atol=2e-4, rtol=2e-4)


@needs_compiler
@pytest.mark.parametrize("name", sorted(LATENTS | OF_OWN_LAYERS))
def test_the_kernels_logits_are_transformers(
    engine: EngineMaker, original: Callable[[str], PreTrainedModel], name: str
) -> None:
    """Where keys and values are latents, or layers of many kinds; of all families
    tests/runtime/cpu/ has torch's. Most rows are close: one that likes two experts nearly alike may
    get the other.
    """
    choices = {"dtype": "bfloat16", "backend": "cpu", "cpu_activations": "bf16"}
    options = ExecutorOptions(num_threads=1)
    runner = CpuRunner(read_engine(engine(name, tp=2, pp=2, **choices)), options)
    found = torch.from_numpy(text_logits(runner, PROMPTS[1]))
    truth = logits_of(original(name), PROMPTS[1])
    assert (found - truth).abs().amax(dim=1).median() < 0.02 * truth.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layerwise_reference_equals_transformers(
    checkpoint: Callable[[str], Path],
    original: Callable[[str], PreTrainedModel],
    name: str,
) -> None:
    source = open_checkpoint(checkpoint(name))
    reference = ReferenceModel(model_config(source.config, "float32"), source)
    hidden = reference.hidden_states([torch.tensor(PROMPTS[0])])
    truth = logits_of(original(name), PROMPTS[0])
    torch.testing.assert_close(reference.logits(hidden)[0], truth, atol=2e-4, rtol=2e-4)


LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def layer_tensors(engine_dir: Path, layer: int) -> dict[str, torch.Tensor]:
    weights = CheckpointWeights(engine_dir, read_config(engine_dir))
    return weights(f"transformer.layers.{layer}.")


@pytest.mark.parametrize("name", OF_ALL_KINDS)
def test_int4_weights_are_the_models_within_half_a_step_unless_clipped(
    engine: EngineMaker, name: str
) -> None:
    tp = 1 if name in MIXTURES - {"mixtral"} else 2  # experts of 64 columns
    quantised = engine(name, quant="int4", group_size=64, tp=tp, dtype="bfloat16")
    found, truth = layer_tensors(quantised, 1), layer_tensors(engine(name, tp=1, pp=1), 1)
    for linear in (key for key in LINEARS if f"{key}.weight" in truth):
        scale = found[f"{linear}.weights_scaling_factor"]
        packed = found[f"{linear}.weight"]
        if packed.ndim == 3:  # experts
            packed, scale = packed.flatten(0, 1), scale.flatten(0, 1)
        back = dequantize_int4(packed, scale)
        step = scale.float().repeat_interleave(64, dim=1)
        weight = truth[f"{linear}.weight"].flatten(0, -2)
        clipped = weight.abs() > 7 * step
        assert clipped.float().mean() < 0.05, "few are clipped, and only where that loses less"
        assert (clipped | ((back - weight).abs() <= 0.53 * step)).all(), linear
    assert_answers(quantised)


@pytest.mark.parametrize("name", OF_ALL_KINDS)
def test_fp8_weights_are_the_models_within_a_rounding(engine: EngineMaker, name: str) -> None:
    choices = dict(quant="fp8", tp=2, dtype="bfloat16", calib_samples=16)
    quantised = engine(name, **choices)
    found, truth = layer_tensors(quantised, 1), layer_tensors(engine(name, tp=1, pp=1), 1)
    for linear in (key for key in LINEARS if f"{key}.weight" in truth):
        weight, scale = found[f"{linear}.weight"], found[f"{linear}.weights_scaling_factor"]
        wanted = truth[f"{linear}.weight"]
        scale = scale.unsqueeze(-1) if weight.ndim == 3 else scale
        back = weight.float() * scale if weight.ndim == 3 else dequantize_fp8(weight, scale)
        if weight.ndim == 3:  # experts: the nearest there is
            assert ((back - wanted).abs() <= wanted.abs() / 16 + scale * 2**-10).all(), linear
        assert float((back - wanted).norm() / wanted.norm()) < 0.05, linear
        assert 0 < found[f"{linear}.activation_scaling_factor"] < 1
    assert_answers(quantised)


@pytest.mark.parametrize("name", ["gemma4-small", "gemma3n"])
def test_layers_that_read_others_keys_have_no_scale_of_their_own(
    engine: EngineMaker, name: str
) -> None:
    choices = dict(quant="fp8", kv_cache_dtype="fp8", dtype="bfloat16", calib_samples=16)
    kept = engine(name, **choices, tp=2, pp=2)
    scales = CheckpointWeights(kept, read_config(kept)).kv_scales()
    assert all(0 < scale < 0.1 for scale in scales[:3]) and scales[3:] == [1.0] * 3
    assert_answers(kept)


@pytest.mark.parametrize("name", ["gemma4-small", "gemma3n"])
def test_a_walk_over_layers_of_several_kinds_settles_awqs_factors(
    engine: EngineMaker, name: str
) -> None:
    assert_answers(engine(name, quant="int4_awq", dtype="bfloat16", calib_samples=16))


def assert_answers(engine_dir: Path) -> None:
    """The executor runs it, and no logit is lost: a lost one would be an EngineError."""
    executor = open_executor(engine_dir, FLOAT32)
    assert len(generate(executor, [Request(0, PROMPTS[0], GREEDY)])[0]) == 10


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen2-window", "phi3"])
def test_a_windowed_engine_carries_its_windows(engine: EngineMaker, name: str) -> None:
    opened = read_engine(engine(name, tp=1, pp=1))
    window = 20 if name == "phi3" else 16
    wanted = {
        "gemma2": [16, 256],
        "gemma3": [16, 256],
        "qwen2-window": [256, 16],
    }.get(name, [window, window])
    assert opened.config.extra["max_attention_window"] == wanted
    assert opened.manifest.limits.max_attention_window == tuple(wanted)
    assert opened.manifest.limits.max_seq_len == 256


@pytest.mark.parametrize(
    ("name", "max_seq_len", "wanted"),
    [
        ("mistral", 256, "; serve with KvCacheConfig(max_attention_window=[16])"),
        ("gemma2", 256, "; serve with KvCacheConfig(max_attention_window=[16, 256])"),
        ("mistral", 16, "to convert"),
        ("qwen3", 256, "to convert"),
    ],
)
def test_the_plan_says_which_window_to_serve_with(
    checkpoint: Callable[[str], Path], name: str, max_seq_len: int, wanted: str
) -> None:
    source = open_checkpoint(checkpoint(name))
    plan = make_plan(load_settings({"max_seq_len": max_seq_len}), source)
    assert describe_plan(plan, source).endswith(wanted)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *(("gemma3", "none"), ("gemma2", "fp8"), ("phi3-longrope", "none"), ("mixtral", "fp8")),
        ("phimoe", "none"),
        *(("gemma4-small", "fp8"), ("gemma4-moe", "none"), ("gemma3n", "none")),
    ],
)
def test_the_verify_stage_measures_the_family(engine: EngineMaker, name: str, quant: str) -> None:
    settings = {"quant": quant, "tp": 2, "until": "verify", "compute_dtype": "float32"}
    verified = read_engine(engine(name, **settings)).manifest.verify
    assert verified is not None
    assert verified["mean_kl"] < (1e-6 if quant == "none" else 0.05)


def test_longrope_takes_its_short_factors_for_a_short_engine(
    engine: EngineMaker, original: Callable[[str], PreTrainedModel]
) -> None:
    executor = open_executor(engine("phi3-longrope", tp=1, pp=1), FLOAT32._replace(max_seq_len=32))
    prompt = list(range(40, 60))
    answer = generate(executor, [Request(0, prompt, GREEDY)])[0]
    truth = logits_of(original("phi3-longrope"), prompt + answer)
    assert answer == truth[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("length", [12, 31, 32, 33, 60])
def test_longrope_changes_its_factors_where_transformers_does(
    engine: EngineMaker, original: Callable[[str], PreTrainedModel], length: int
) -> None:
    """From prompts before, at and beyond the pretrained length of 32: as soon as a sequence is
    longer, all of it is computed again with the long factors, in transformers' `generate` too.
    """
    executor = open_executor(engine("phi3-longrope", tp=1, pp=1), FLOAT32)
    assert isinstance(executor, TorchExecutor)
    compute, seen = executor.runner.model.logits, []
    executor.runner.model.logits = lambda hidden: seen.append(compute(hidden)) or seen[-1]
    prompt = [7 * i % 500 + 3 for i in range(length)]
    sampling = SamplingParams(24, temperature=0.0, ignore_eos=True)
    answer = generate(executor, [Request(0, prompt, sampling)])[0]
    model = original("phi3-longrope")
    for i, logits in enumerate(torch.cat(seen)):
        truth = logits_of(model, prompt + answer[:i])[-1]
        torch.testing.assert_close(logits, truth, atol=2e-4, rtol=2e-4)
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert theirs[0, length:].tolist() == answer


@pytest.mark.parametrize("length", [32, 33, 80])
def test_a_phimoe_turns_long_contexts_by_its_long_factors(length: int, tmp_path: Path) -> None:
    """As it was trained to; transformers 5 does so only where its function is told the length."""
    rope = {**FAMILIES["phimoe"][1]["rope_parameters"], "original_max_position_embeddings": 32}
    source = open_checkpoint(save_family("phimoe", tmp_path / "in", rope_parameters=rope))
    built = build_engine(source, tmp_path / "e", dtype="float32", until="compile")
    executor = open_executor(built, FLOAT32)
    assert isinstance(executor, TorchExecutor)
    ids, model = PROMPTS[1][:length], executor.runner.model
    hidden = model.hidden_states(torch.tensor(ids), torch.arange(length), causal_attention)
    theirs = load_family(tmp_path / "in")
    rotary = theirs.model.rotary_emb
    rotary.rope_init_fn = partial(rotary.rope_init_fn, seq_len=length)
    torch.testing.assert_close(model.logits(hidden), logits_of(theirs, ids), atol=2e-4, rtol=2e-4)


def test_longrope_shares_no_prefix_between_short_and_long_prompts(engine: EngineMaker) -> None:
    """A short prompt's keys are of no use to a longer one, whatever runs beside it."""
    path = engine("phi3-longrope", tp=1, pp=1)
    base = [7 * i % 500 + 3 for i in range(60)]
    prompts = [base[:20], base[:60], base[:20], base[:50], base[:32], base[:33]]
    alone = [
        generate(open_executor(path, FLOAT32), [Request(0, prompt, GREEDY)])[0]
        for prompt in prompts
    ]
    executor = open_executor(path, FLOAT32._replace(max_num_tokens=8))
    together = generate(executor, [Request(i, prompt, GREEDY) for i, prompt in enumerate(prompts)])
    assert [together[i] for i in range(len(prompts))] == alone
    assert executor.stats().num_cached_tokens > 0, "equal factors still share"


@pytest.mark.parametrize(
    "choices",
    [
        {"quant": "int4", "backend": "tensorrt_llm"},
        {"quant": "int4", "format": "hf"},
        {"quant": "int4_awq"},
    ],
)
def test_forms_of_experts_that_nobody_runs_are_refused_at_plan_time(
    checkpoint: Callable[[str], Path], choices: dict[str, Any]
) -> None:
    source: SourceCheckpoint = open_checkpoint(checkpoint("mixtral"))
    with pytest.raises(PlanError, match="has no known form for a mixture .* choose none, fp8"):
        make_plan(load_settings(choices), source)


def test_groups_fit_the_latents_of_queries_and_what_attention_gives(
    checkpoint: Callable[[str], Path],
) -> None:
    """64 elements, and 32 of each of 4 heads."""
    source: SourceCheckpoint = open_checkpoint(checkpoint("youtu"))
    for tp in (1, 2):
        assert make_plan(load_settings({"quant": "int4_awq", "tp": tp}), source).group_size == 64
    with pytest.raises(PlanError, match="over tp=4, .* legal tp for int4_awq: 1, 2:"):
        make_plan(load_settings({"quant": "int4_awq", "tp": 4}), source)
    with pytest.raises(PlanError, match="q_lora_rank=64, the in_features of .* multiple of 128"):
        make_plan(load_settings({"quant": "w4a8_awq"}), source)


def test_dense_layers_between_mixtures_are_refused_for_tensorrt_llm(
    checkpoint: Callable[[str], Path],
) -> None:
    source: SourceCheckpoint = open_checkpoint(checkpoint("qwen3-moe-dense"))
    with pytest.raises(PlanError, match=r"layers without experts \(1 of 2\); choose backend=cpu"):
        make_plan(load_settings({"backend": "tensorrt_llm", "until": "convert"}), source)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_rows_of_experts_have_scales_of_their_own(engine: EngineMaker, name: str) -> None:
    quantised = engine(name, quant="fp8_rowwise", tp=2, dtype="bfloat16")
    found, truth = layer_tensors(quantised, 1), layer_tensors(engine(name, tp=1, pp=1), 1)
    for linear in ("mlp.fc", "mlp.proj"):
        scale = found[f"{linear}.per_channel_scale"].unsqueeze(-1)
        back, wanted = found[f"{linear}.weight"].float() * scale, truth[f"{linear}.weight"]
        assert ((back - wanted).abs() <= wanted.abs() / 16 + scale * 2**-9).all()
    assert_answers(quantised)


TOWER = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
# What google/gemma-3-4b-it's config.json has beside its tower.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("longer", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_gemma_3_equals_transformers(
    longer: str, tmp_path: Path
) -> None:
    text = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
    config = transformers.Gemma3Config(
        text_config={**text, **FAMILIES["gemma3"][1]},
        vision_config={**TOWER, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        dtype="float32",
    )
    torch.manual_seed(5)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    path = tmp_path / "whole"
    whole.save_pretrained(path)
    tensors = {
        name.replace("language_model.model.", longer): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    train_tokenizer(VOCAB).save(str(path / "tokenizer.json"))
    source = resolve_source(str(path), tmp_path)
    built = build_engine(source, tmp_path / "e", dtype="float32", until="compile", tp=2)
    executor = open_executor(built, FLOAT32)
    assert isinstance(executor, TorchExecutor)
    ids = torch.tensor(PROMPTS[1])
    model = executor.runner.model
    found = model.logits(model.hidden_states(ids, torch.arange(len(ids)), causal_attention))
    with torch.inference_mode():
        truth = whole(ids[None]).logits[0]
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=2e-4)


def test_what_a_released_gemma_3_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_3_4B))
    source = resolve_source(str(tmp_path), tmp_path)
    found = model_config(source.config, "auto")
    text = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    wanted = {**text.to_dict(), "architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16"}
    assert found == model_config(wanted, "auto")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected_shapes(found)
    assert source.eos_token_ids == (1, 106) and make_plan(load_settings({"until": "plan"}), source)
