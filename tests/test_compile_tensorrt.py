"""TensorRT-RTX's own compiler, on a machine with or without a GPU: what it takes and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceMaker, build_engine
from family_models import FAMILIES, MIXTURES

from enginehouse.build import cli
from enginehouse.build.capabilities import (
    GPU_SM,
    tensorrt_package,
    tensorrt_refusal,
)
from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.compile_tensorrt import (
    PlanLimits,
    compile_plan,
    load_tensorrt,
    plan_limits,
)
from enginehouse.build.forms import QUANT_CONFIGS
from enginehouse.build.plan import make_plan
from enginehouse.build.settings import load_settings
from enginehouse.runtime.config import Mapping, ModelConfig
from enginehouse.runtime.engine import read_engine, verify_files
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.executor import open_executor
from enginehouse.runtime.tensorrt_package import PACKAGES, RTX_SMS

FORMS = sorted(QUANT_CONFIGS.keys() - {"w4a8_awq"})
TINY = PlanLimits(context=256, batch=8, chunk=64, prefill_batch=1, max_positions=256)
# Values of nvinfer1::EngineInvalidityDiagnostics.
MALFORMED = 32


def tiny_config(quant: str, dtype: str = "bfloat16", tp: int = 1, **changes: Any) -> ModelConfig:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        dtype=dtype,
        vocab_size=510,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_size=32,
        intermediate_size=512,
        norm_epsilon=1e-5,
        max_position_embeddings=256,
        quantization=replace(QUANT_CONFIGS[quant], group_size=64),
    )
    return replace(config, **changes).with_mapping(Mapping(tp))


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


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("sm", [80, 86, 89, 120])
@pytest.mark.parametrize("quant", FORMS)
def test_each_form_compiles_or_is_refused_as_the_table_says(quant: str, sm: int, tp: int) -> None:
    """TP 4 has more ranks than key heads; 510 tokens are padded to 512."""
    assert_as_the_table_says(quant, "bfloat16", sm, tp)


@pytest.mark.parametrize("quant", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_turing_takes_what_the_table_says(dtype: str, quant: str) -> None:
    assert_as_the_table_says(quant, dtype, 75, 1)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MIXTURES))
def test_every_dense_family_compiles_for_all_targets_at_once(
    family: str, family_source: SourceMaker
) -> None:
    settings = dict(backend="tensorrt", dtype="bfloat16", quant="int4", tp=2, until="plan")
    plan = make_plan(load_settings(settings), family_source(family))
    assert plan.targets == (80, 86, 89, 120)
    compiled = compile_plan(load_tensorrt(), plan.config, plan.targets, TINY)
    assert compiled.plan[:4] == b"vtrt"


def test_the_sample_model_compiles_whole(sample_source: SourceCheckpoint) -> None:
    settings = load_settings(dict(backend="tensorrt", quant="int4", gpu="l40s", until="plan"))
    plan = make_plan(settings, sample_source)
    assert plan.targets == (89,)
    limits = plan_limits(plan.max_seq_len, settings.max_batch_size, plan.max_num_tokens)
    assert [each.context for each in limits] == [2048, 8192]
    compiled = compile_plan(load_tensorrt(), plan.config, plan.targets, limits[0])
    assert len(compiled.plan) < plan.rank_bytes[0] / 2, "the plan holds weights"


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


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", dict(gpu="h100"), "no target SM90; the data-centre package .* backend=tensorrt_llm"),
    ("llama", dict(gpu="a100", quant="fp8"), "a100 .SM80.: FP8 products need SM89; choose quant"),
    ("llama", dict(sm="86,89", quant="fp8_rowwise"), "does not run on SM86: FP8 products need"),
    ("llama", dict(sm="75"), "bfloat16 needs SM80, choose dtype=float16"),
    ("llama", dict(sm="75", dtype="float16", tp=2), "collectives need SM80"),
    ("llama", dict(sm="89.0"), "sm='89.0' is no list of SMs; wanted some of 75,80,86,89,120,121"),
    ("llama", dict(sm="89", gpu="l4"), "one of them names the targets"),
    ("llama", dict(quant="fp8", kv_cache_dtype="fp8"), "KV cache is never FP8; choose kv_cache_dt"),
    ("llama", dict(pp=2), "pp=2: its network is not cut by layers; choose pp=1 and tp"),
    ("llama", dict(backend="torch", sm="89"), "sm=89 is of no use with backend=torch"),
    ("mixtral", {}, "mixture of experts, for which TensorRT-RTX has no layer; choose backend="),
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
    assert plan["seconds"] > 0 and plan["peak_memory_bytes"] > 1 << 20
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
