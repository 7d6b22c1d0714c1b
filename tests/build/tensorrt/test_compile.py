"""TensorRT-RTX's own compiler, on a machine with or without a GPU: what it takes and refuses."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from enginehouse.build import cli
from enginehouse.build.forms.capabilities import (
    GPU_SM,
    tensorrt_package,
    tensorrt_refusal,
)
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.plan.build_plan import make_plan
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.tensorrt.compile import (
    PlanLimits,
    compile_plan,
    load_tensorrt,
    plan_limits,
)
from enginehouse.build.tensorrt.network import whole_decoder
from enginehouse.build.tensorrt.parts import cut_decoder
from enginehouse.build.tensorrt.plans import cached_tokens, compile_jobs, jobs_at_once, plan_jobs
from enginehouse.build.tensorrt.worker import STEPS, Job, rank_constants
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.config import EXCLUDE_MODULES, ModelConfig
from enginehouse.runtime.engine import read_config, read_engine, verify_files
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.tensorrt.package import PACKAGES, RTX_SMS
from makers.engines import SourceMaker, build_engine
from makers.family_models import BEYOND_TENSORRT, FAMILIES, MIXTURES
from makers.tiny_network import TINY, tiny_config

FORMS = sorted(QUANT_CONFIGS.keys() - {"w4a8_awq"})
# Values of nvinfer1::EngineInvalidityDiagnostics.
MALFORMED = 32


def assert_as_the_table_says(quant: str, dtype: str, sm: int, tp: int) -> None:
    config = tiny_config(quant, dtype, tp)
    if tensorrt_refusal(quant, dtype, sm, tp) is None:
        plan = compile_plan(load_tensorrt(), config, [sm], TINY).plan
        assert plan[:4] == b"vtrt"
        runtime = load_tensorrt().Runtime(load_tensorrt().Logger(load_tensorrt().Logger.ERROR))
        assert not runtime.get_engine_validity(plan[:64])[1] & MALFORMED
        return
    with pytest.raises(PlanError, match=rf"^TensorRT refuses the engine for SM{sm}: Cannot comp"):
        compile_plan(load_tensorrt(), config, [sm], TINY)


SMS = (80, 86, 89, 120)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("quant", FORMS)
def test_each_form_compiles_or_is_refused_as_the_table_says(quant: str, sm: int) -> None:
    """TP 4 has more ranks than key heads; 510 tokens are padded to 512."""
    assert_as_the_table_says(quant, "bfloat16", sm, 4)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("quant", FORMS)
def test_fewer_ranks_compile_for_all_that_the_table_takes_at_once(quant: str, tp: int) -> None:
    taken = [sm for sm in SMS if tensorrt_refusal(quant, "bfloat16", sm, tp) is None]
    plan = compile_plan(load_tensorrt(), tiny_config(quant, "bfloat16", tp), taken, TINY).plan
    assert plan[:4] == b"vtrt"


@pytest.mark.parametrize("quant", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_turing_takes_what_the_table_says(dtype: str, quant: str) -> None:
    assert_as_the_table_says(quant, dtype, 75, 1)


# Networks of the same layers as another family's.
LIKE_OTHERS = {
    *("mistral-nemo", "qwen2-tied", "qwen2-window", "seed-oss", "phi3", "ernie4.5", "helium"),
    *("ernie4.5-biased", "arcee", "stablelm", "glm", "cohere", "olmo2", "exaone4-whole"),
    *("internlm3", "cwm", "ministral", "granite-hybrid"),
    *("granite-moe", "olmoe", "qwen3-moe", "qwen3-moe-raw", "flex-olmo", "glm4-moe-air", "dots1"),
    *("ernie4.5-moe", "granite-moe-shared", "minimax-m2", "hunyuan-moe", "phimoe-tied"),
    *("glm4-moe-lite", "llama4-chunked"),
}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - BEYOND_TENSORRT - LIKE_OTHERS))
def test_every_kind_of_decoder_compiles_for_all_targets_at_once(
    family: str, family_source: SourceMaker
) -> None:
    quant = "none" if family in MIXTURES else "int4"
    settings = dict(backend="tensorrt", dtype="bfloat16", quant=quant, tp=2, until="plan")
    plan = make_plan(load_settings(settings), family_source(family))
    assert plan.targets == (80, 86, 89, 120)
    compiled = compile_plan(load_tensorrt(), plan.config, plan.targets, TINY)
    assert compiled.plan[:4] == b"vtrt"


def test_experts_in_fp8_compile_where_fp8_does(family_source: SourceMaker) -> None:
    """With one that every token sees."""
    settings = dict(backend="tensorrt", quant="fp8", tp=2, until="plan")
    plan = make_plan(load_settings(settings), family_source("qwen2-moe"))
    assert plan.targets == (89, 120)
    assert compile_plan(load_tensorrt(), plan.config, plan.targets, TINY).plan[:4] == b"vtrt"


def test_the_sample_model_compiles_without_its_weights(sample_source: SourceCheckpoint) -> None:
    """Four of its thirty layers, which are alike."""
    settings = load_settings(dict(backend="tensorrt", quant="int4", gpu="l40s", until="plan"))
    plan = make_plan(settings, sample_source)
    assert plan.targets == (89,)
    limits = plan_limits(plan.max_seq_len, settings.max_batch_size, plan.max_num_tokens)
    assert [each.context for each in limits] == [2048, 8192]
    config = replace(plan.config, num_hidden_layers=4)
    compiled = compile_plan(load_tensorrt(), config, plan.targets, limits[0])
    embedding_bytes = 2 * config.vocab_size * config.hidden_size
    assert len(compiled.plan) < embedding_bytes / 2, "the plan holds weights"


def test_long_contexts_have_small_batches() -> None:
    """No larger than what a GPU could hold the keys and values of; several prompts, never many."""
    limits = plan_limits(100_000, 64, 65536, cached_tokens=300_000)
    assert [(each.context, each.batch) for each in limits] == [
        (2048, 64),
        (8192, 36),
        (32768, 9),
        (100_032, 2),
    ]
    assert [each.prefill_batch for each in limits] == [4, 4, 4, 2]
    assert [each.batch for each in plan_limits(4096, 3, 64, cached_tokens=1)] == [1, 1]
    config = tiny_config("none")
    row_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
    assert cached_tokens(config, (89, 120)) == int(95.3 * 2**30) // row_bytes
    assert cached_tokens(config, (75,)) == int(268.6 * 2**30) // row_bytes, "of no known GPU"


def test_a_long_context_has_a_fused_attention_for_decoding_too() -> None:
    limits = PlanLimits(32768, 8, 64, 1, 32768)
    config = tiny_config("none", max_position_embeddings=32768)
    assert compile_plan(load_tensorrt(), config, [89], limits).plan[:4] == b"vtrt"


def test_attention_with_sinks_is_one_kernel_too(family_source: SourceMaker) -> None:
    """Four heads on a rank, which have one; the scores of a chunk would take 64 MiB alone."""
    settings = dict(backend="tensorrt", dtype="bfloat16", quant="none", until="plan")
    config = make_plan(load_settings(settings), family_source("gpt-oss")).config
    limits = PlanLimits(16384, 8, 256, 1, 16384)
    compiled = compile_plan(load_tensorrt(), config, SMS, limits)
    assert compiled.scratch_bytes[1] < 4 * 256 * 16384 * 4


def test_layers_that_are_alike_share_a_plan() -> None:
    """80 layers of one kind; six kinds of stretches where every sixth layer sees all."""
    config = tiny_config("fp8", num_hidden_layers=80)
    parts = cut_decoder(config)
    assert [each.part.num_layers for each in parts] == [0, *[10] * 8, 0]
    assert len({each.like for each in parts}) == 3
    assert [layer for each in parts for layer in each.part.layers] == list(range(80))
    windows = [*[128] * 5, 256]
    gemma = replace(config, num_hidden_layers=62, extra={"max_attention_window": windows})
    parts = cut_decoder(gemma)
    assert [each.part.num_layers for each in parts] == [0, *[6] * 10, 2, 0]
    assert len({each.like for each in parts}) == 4
    assert len({each.like for each in cut_decoder(config, shared=False)}) == 10
    only = (*EXCLUDE_MODULES, "transformer.layers.7.mlp.proj")
    unlike = replace(config, quantization=replace(config.quantization, exclude_modules=only))
    likes = [each.like.first_layer for each in cut_decoder(unlike, 10)]
    assert likes == [0, 0, *[10] * 7, 80]
    whole = cut_decoder(replace(config, num_hidden_layers=32))
    assert [tuple(each.part) for each in whole] == [(0, 32, True, True)]


@pytest.mark.parametrize("quant", FORMS)
def test_every_form_compiles_with_its_weights_in_the_plan(
    quant: str, tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    """That they are the right ones, tests/build/tensorrt/test_network.py tells; here the table of
    tokens, which the compiler keeps as it is.
    """
    settings = dict(backend="tensorrt", quant=quant, sm="89", tp=2, max_seq_len=256)
    path = build_engine(tiny_source, tmp_path / "e", until="convert", **settings)
    config = read_config(path)
    part = whole_decoder(config)
    constants = rank_constants(config, path, 1, part, 256)
    plan = compile_plan(load_tensorrt(), config, [89], TINY, None, part, constants).plan
    table = constants["transformer.vocab_embedding.weight"]
    assert table.view(torch.uint8).numpy().tobytes() in plan


def test_baked_weights_give_each_rank_plans_of_its_own(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    settings = dict(backend="tensorrt", quant="int4", sm="89", tp=2, max_seq_len=256)
    settings |= dict(bake_weights=True, until="compile")
    path = build_engine(tiny_source, tmp_path / "e", **settings)
    built = read_engine(path).manifest.tensorrt
    assert built is not None and built["weights"] == "constants"
    (plan,) = built["plans"]
    files = ["decoder-256-rank0.plan", "decoder-256-rank1.plan"]
    assert plan["parts"] == [{"first_layer": 0, "num_layers": 2, "files": files}]
    assert "file" not in plan and built["files"].keys() == set(files)
    assert (path / files[0]).read_bytes() != (path / files[1]).read_bytes()
    with pytest.raises(EngineError, match="need a GPU with SM89"):
        open_executor(path)


def test_a_layer_that_the_compiler_refuses_is_named_in_the_models_terms() -> None:
    config = tiny_config("none", head_size=31)
    with pytest.raises(EngineError, match=r"layers\.0: rotary: .*31 but must be") as caught:
        compile_plan(load_tensorrt(), config, [89], TINY)
    assert "\n" not in str(caught.value) and "cuda" not in str(caught.value).lower()


def test_every_gpu_has_a_package() -> None:
    packages = {gpu: tensorrt_package(sm) for gpu, sm in GPU_SM.items()}
    assert packages["l40s"] == packages["rtx5090"] == "tensorrt_rtx"
    assert packages["h100"] == packages["b200"] == "tensorrt"
    names = {name for name in dir(load_tensorrt().ComputeCapability) if name.startswith("SM")}
    assert names == {f"SM{sm}" for sm in RTX_SMS}


def test_an_engine_in_parts_lists_them_in_the_order_in_which_they_run(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    settings = dict(backend="tensorrt", quant="int4", sm="89", max_seq_len=256, plan_layers=1)
    path = build_engine(tiny_source, tmp_path / "e", until="compile", **settings)
    built = read_engine(path).manifest.tensorrt
    assert built is not None
    (plan,) = built["plans"]
    layers = ["layers-0-0-256.plan"]
    assert plan["parts"] == [
        {"first_layer": 0, "num_layers": 0, "files": ["embedding-chunk64.plan"]},
        {"first_layer": 0, "num_layers": 1, "files": layers},
        {"first_layer": 1, "num_layers": 1, "files": layers},
        {"first_layer": 2, "num_layers": 0, "files": ["head-chunk64.plan"]},
    ]
    files = built["files"]
    assert {name: (path / name).stat().st_size for name in files} == {
        name: file["bytes"] for name, file in files.items()
    }
    assert plan["bytes"] == sum(file["bytes"] for file in files.values())
    assert plan["peak_memory_bytes"] == max(file["peak_memory_bytes"] for file in files.values())
    with pytest.raises(EngineError, match="need a GPU with SM89"):
        open_executor(path)


def jobs_of(config: ModelConfig, directory: Path, sms: tuple[int, ...] = (89,)) -> dict[str, Job]:
    return plan_jobs(config, sms, [TINY], directory, plan_layers=1)[0]


def test_each_plan_is_compiled_in_a_process_of_its_own(tmp_path: Path) -> None:
    """This process's memory is no plan's; each plan reports all of its steps."""
    ballast = bytearray(2 << 30)
    ballast[:: 1 << 12] = b"x" * (len(ballast) >> 12)
    jobs, steps = jobs_of(tiny_config("none", num_hidden_layers=2), tmp_path), []
    costs = compile_jobs(jobs, 2, steps.append)
    assert sum(steps) == STEPS * len(jobs) and len(ballast) == 2 << 30
    assert costs.keys() == jobs.keys()
    for name, cost in costs.items():
        assert (tmp_path / name).stat().st_size == cost["bytes"]
        assert 64 << 20 < cost["peak_memory_bytes"] < 2 << 30
        assert len(cost["scratch_bytes"]) == 2
        assert all(cost["scratch_bytes"]) == (name != "embedding-chunk64.plan"), "looks up only"


def test_a_plan_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    jobs = jobs_of(tiny_config("none", num_hidden_layers=1), tmp_path / "gone")
    message = (
        r"^\S+\.plan cannot be written: No such file or directory; make room for it, or choose"
    )
    with pytest.raises(EngineError, match=message):
        compile_jobs(jobs, 1, lambda _: None)


def test_scratch_memory_follows_what_is_computed_at_once() -> None:
    """Four times the sequences: more than twice the memory, as their caches are looked at."""
    config = tiny_config("none", num_hidden_layers=1)
    few, many = (TINY._replace(context=4096, batch=batch) for batch in (16, 64))
    plans = [compile_plan(load_tensorrt(), config, (89,), limits) for limits in (few, many)]
    decoding = [plan.scratch_bytes[0] for plan in plans]
    assert 2 * decoding[0] < decoding[1]
    assert plans[0].scratch_bytes[1] == plans[1].scratch_bytes[1], "prompts are as before"


def test_the_first_refusal_of_a_process_ends_the_others(tmp_path: Path) -> None:
    jobs = jobs_of(tiny_config("fp8", num_hidden_layers=2), tmp_path, (80,))
    with pytest.raises(PlanError, match=r"^TensorRT refuses the engine for SM80: Cannot compile"):
        compile_jobs(jobs, 2, lambda _: None)


def test_a_lost_process_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(tiny_config("none"), tmp_path)
    for code, words in (("9", "was killed, as it is when memory runs out"), ("7", "status -7")):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\nread line\nkill -{code} $$\n")
        script.chmod(0o755)
        monkeypatch.setattr("enginehouse.build.tensorrt.plans.sys.executable", str(script))
        with pytest.raises(EngineError, match=words):
            compile_jobs(jobs, 1, lambda _: None)


def test_jobs_at_once_are_bounded_by_cores_and_memory(tmp_path: Path) -> None:
    jobs = list(jobs_of(tiny_config("none", num_hidden_layers=9), tmp_path).values())
    cores = len(os.sched_getaffinity(0))
    assert jobs_at_once(jobs, 1 << 40) == min(cores, len(jobs))
    assert jobs_at_once(jobs, 1 << 20) == 1
    timed = [job._replace(package="tensorrt") for job in jobs]
    assert jobs_at_once(timed, 1 << 40) == 1


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", dict(sm="70"), "does not run on SM70: TensorRT has no target SM70"),
    ("llama", dict(sm="89,90"), "SM90 is compiled only by tensorrt, one at a time and on such a"),
    ("llama", dict(backend="torch", bake_weights=True), "bake_weights is of no use with backend"),
    ("llama", dict(backend="torch", plan_layers=2), "plan_layers is of no use with backend=torch"),
    ("llama", dict(gpu="a100", quant="fp8"), "a100 .SM80.: FP8 products need SM89; choose quant"),
    ("llama", dict(sm="86,89", quant="fp8_rowwise"), "does not run on SM86: FP8 products need"),
    ("llama", dict(sm="75"), "bfloat16 needs SM80, choose dtype=float16"),
    ("llama", dict(sm="75", dtype="float16", tp=2), "collectives need SM80"),
    ("llama", dict(sm="89.0"), "sm='89.0' is no list of SMs; wanted some of 75,80,86,89,120,121"),
    ("llama", dict(sm="89", gpu="l4"), "one of them names the targets"),
    ("llama", dict(quant="fp8", kv_cache_dtype="fp8"), "KV cache is never FP8; choose kv_cache_dt"),
    ("llama", dict(pp=2), "pp=2: its network is not cut by layers; choose pp=1 and tp"),
    ("llama", dict(backend="torch", sm="89"), "sm=89 is of no use with backend=torch"),
]


@pytest.mark.parametrize(("family", "settings", "wanted"), REFUSALS)
def test_what_cannot_be_compiled_is_refused_before_a_weight_is_read(
    family: str, settings: dict[str, Any], wanted: str, family_source: SourceMaker
) -> None:
    chosen = load_settings({"backend": "tensorrt", "until": "plan", **settings})
    with pytest.raises(PlanError, match=wanted) as caught:
        make_plan(chosen, family_source(family))
    assert "\n" not in str(caught.value)


def test_an_engine_holds_plans_and_the_checkpoint(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    """Two ranks share the plans; another build finds nothing to do; no GPU is one sentence."""
    settings = dict(backend="tensorrt", quant="int4", sm="86,89", tp=2, max_seq_len=1024)
    path = build_engine(tiny_source, tmp_path / "e", **settings)
    engine = read_engine(path)
    verify_files(engine)
    manifest = engine.manifest
    assert manifest.backend == "tensorrt" and manifest.verify is not None
    assert {"rank0.safetensors", "rank1.safetensors", "decoder-1024.plan"} < manifest.files.keys()
    built = manifest.tensorrt
    assert built is not None
    assert (built["package"], built["targets"]) == ("tensorrt_rtx", [86, 89])
    assert built["version"] == load_tensorrt().__version__
    (plan,) = built["plans"]
    assert plan["bytes"] == (path / plan["file"]).stat().st_size
    assert (plan["context"], plan["batch"], plan["chunk"], plan["prefill_batch"]) == (
        1024,
        8,
        64,
        1,
    )
    assert plan["parts"] == [{"first_layer": 0, "num_layers": 2, "files": [plan["file"]]}]
    assert built["weights"] == "inputs"
    assert plan["seconds"] > 0 and plan["peak_memory_bytes"] > 64 << 20
    assert built["files"][plan["file"]]["bytes"] == plan["bytes"]
    written = (path / "manifest.json").stat().st_mtime_ns
    build_engine(tiny_source, path, **settings)
    assert (path / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(EngineError, match=r"need a GPU with SM86 or SM89 .* --backend torch$"):
        open_executor(path)


def test_the_page_of_a_plan_shows_which_package_compiles_for_which_gpu(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(tiny_checkpoint), "--backend", "tensorrt", "--plan"]) == 0
    page = capsys.readouterr().out
    assert "Compiled for SM 80, 86, 89, 120" in page
    assert any("l40s" in line and "tensorrt_rtx" in line for line in page.splitlines())


def test_without_the_package_one_sentence_says_what_to_install(
    tiny_source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = PACKAGES["tensorrt_rtx"]
    monkeypatch.setitem(PACKAGES, "tensorrt_rtx", known._replace(modules=("no_such_tensorrt",)))
    with pytest.raises(EngineError, match=r"not installed.*pip install 'enginehouse\[tensorrt\]'"):
        build_engine(tiny_source, tmp_path / "e", backend="tensorrt", quant="int4")
    assert not (tmp_path / "e").exists()
