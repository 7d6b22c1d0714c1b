"""The double is strict: what TensorRT-LLM 1.2.1 would not take, it does not take either."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from doubles.trtllm_double import (
    build_arguments,
    compiled_engine,
    edit_json,
    install_double,
    trtllm_build,
)
from makers.engines import EngineMaker
from makers.paths import CONTRACT, DOUBLES

pytestmark = pytest.mark.usefixtures("one_thread")

TABLES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(CONTRACT.glob("*.*.json"))
}
# The tables of these pad 576 inputs to groups of 128, which no rank file can hold.
PADDED = [f"smollm2-135m.{form}" for form in ("w4a16_awq", "w4a16_awq_nopqs", "w4a8_awq")]
CASES = [
    (table, case) for table, data in TABLES.items() if table not in PADDED for case in data["cases"]
]


@pytest.fixture(scope="module", autouse=True)
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        yield patch


def table_config(table: str, tp: int, pp: int) -> dict[str, Any]:
    meta = TABLES[table]["meta"]
    group = re.search(r"group_size (\d+)", meta["note"])
    form = table.split(".")[-1]
    quantization: dict[str, Any] = {
        "quant_algo": (meta.get("quant_config") or {}).get("quant_algo"),
        "kv_cache_quant_algo": "FP8" if form.endswith("_kvfp8") else None,
        "group_size": int(group[1]) if group else 128,
        "pre_quant_scale": form in ("w4a16_awq", "w4a8_awq"),
    }
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    config = {**meta["config"], "mapping": mapping, "quantization": quantization}
    return {**config, "use_parallel_embedding": tp > 1}


@pytest.mark.parametrize(("table", "case"), CASES)
def test_the_doubles_tables_are_the_contracts(table: str, case: str) -> None:
    from tensorrt_llm.tables import check_config, expected_tensors

    tp, pp = (int(number) for number in re.findall(r"\d+", case))
    config, wanted = table_config(table, tp, pp), TABLES[table]["cases"][case]
    if "illegal" in wanted:
        with pytest.raises((AssertionError, NotImplementedError)):
            check_config(config)
            expected_tensors(config, 0)
        return
    check_config(config)
    for stage in wanted.values():
        for rank in stage["ranks"]:
            found = {
                name: [list(entry.shape), "|".join(entry.dtypes)]
                for name, entry in expected_tensors(config, rank).items()
            }
            assert found == stage["checkpoint_tensors"]


@pytest.fixture
def checkpoint(make_engine: EngineMaker, tmp_path: Path) -> Path:
    """A checkpoint of two ranks in FP8 that a test may damage."""
    source = make_engine(quant="fp8", tp=2, dtype="bfloat16", until="compile")
    target = tmp_path / "checkpoint"
    target.mkdir()
    for name in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_a_whole_checkpoint_is_built_into_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    result = trtllm_build(checkpoint, tmp_path / "engine", "--use_fp8_context_fmha", "enable")
    assert result.returncode == 0, result.stderr
    built = json.loads((tmp_path / "engine" / "config.json").read_text())
    signatures = json.loads((CONTRACT / "signatures.json").read_text())
    assert list(built) == signatures["engine_dir"]["config.json"]["keys"]
    assert built["version"] == "1.2.1"
    assert built["pretrained_config"] == json.loads((checkpoint / "config.json").read_text())
    limits = built["build_config"]
    assert (limits["max_batch_size"], limits["max_num_tokens"]) == (8, 64)
    assert limits["max_seq_len"] == 2048, "the model's, as nothing else was said"
    absent = signatures["engine_dir"]["config.json"]["build_config_absent"]
    assert limits.keys() == signatures["classes"]["BuildConfig"]["fields"].keys() - absent
    assert limits["plugin_config"]["use_paged_context_fmha"] is True
    assert {path.name for path in (tmp_path / "engine").iterdir()} == {
        "config.json",
        "rank0.engine",
        "rank1.engine",
    }


def built_here(checkpoint: Path, output: Path, *flags: str) -> None:
    """trtllm-build in this process, where starting costs nothing."""
    from tensorrt_llm.build_command import main

    main([*build_arguments(checkpoint, output), *flags])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_concurrency", "4"], "unrecognized arguments: --max_concurrency"),
        (["--max_batch", "4"], "unrecognized arguments: --max_batch"),  # no abbreviations
        (["--gemm_plugin", "fp16"], "invalid choice: 'fp16'"),
        (["--kv_cache_type", "PAGED"], "invalid choice: 'PAGED'"),
        (["--context_fmha", "true"], "invalid choice: 'true'"),
        (["--max_seq_len", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_wrong_flag_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        built_here(tmp_path, tmp_path / "engine", *flags)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_num_tokens", "4"], "max_num_tokens must not be smaller"),
        (["--streamingllm", "enable"], "StreamingLLM is not supported"),
    ],
)
def test_flags_that_contradict_are_refused(
    checkpoint: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        built_here(checkpoint, tmp_path / "engine", *flags)


def quantization(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", quantization={**config["quantization"], **changes})

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "rank1.safetensors")
        change(found)
        save_file(found, folder / "rank1.safetensors")

    return apply


NORM, LINEAR = "transformer.ln_f.weight", "transformer.layers.0.mlp.fc.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (quantization(zero_point=True), "unexpected keyword argument 'zero_point'"),
        (quantization(quant_algo="FP8_PER_TENSOR"), "is not a valid QuantAlgo"),
        (quantization(kv_cache_quant_algo="INT4"), "is not a valid KV cache QuantAlgo"),
        (
            quantization(quant_algo="W8A16", kv_cache_quant_algo="FP8"),
            "only works with fp8 quantization",
        ),
        (quantization(kv_cache_quant_algo="INT8"), "INT8 KV cache does not work"),
        (config(architecture="LlamaModel"), "has no table for LlamaModel"),
        (config(mapping={"world_size": 2, "tp_size": 4}), "world_size must equal tp*pp*cp"),
        (config(num_attention_heads=7), "num_attention_heads % tp_size"),
        (config(position_embedding_type="learned_absolute"), "rope_gpt_neox"),
        (tensors(lambda t: t.pop(NORM)), f"Required but not provided tensors:['{NORM}']"),
        (
            tensors(lambda t: t.update({NORM: t[NORM][:-1].clone()})),
            f"{NORM}: (255,), wanted (256,)",
        ),
        (tensors(lambda t: t.update({NORM: t[NORM].float()})), f"{NORM}: float32, wanted bfloat16"),
        (
            tensors(lambda t: t.update({LINEAR: t[LINEAR].view(torch.uint8)})),
            f"{LINEAR}: uint8, wanted float8_e4m3fn",
        ),
        (lambda folder: (folder / "rank1.safetensors").unlink(), "rank1.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(checkpoint)
    with pytest.raises(Exception, match=re.escape(said)):  # of each kind that 1.2.1 raises
        built_here(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine" / "config.json").exists()


def test_fp8_context_fmha_can_be_what_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_NO_FP8_FMHA", "1")
    with pytest.raises(RuntimeError, match="FP8 context FMHA"):
        built_here(checkpoint, tmp_path / "engine")
    built_here(checkpoint, tmp_path / "engine", "--use_fp8_context_fmha", "disable")
    assert (tmp_path / "engine" / "rank1.engine").exists()


def test_fp8_needs_a_gpu_that_has_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_GPU", "NVIDIA A100, 8.0")
    with pytest.raises(RuntimeError, match="FP8 is not supported on SM80"):
        built_here(checkpoint, tmp_path / "engine")


@pytest.fixture(scope="module")
def engine(make_engine: EngineMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch_engine = make_engine(quant="none", dtype="float32", until="compile")
    return compiled_engine(torch_engine, tmp_path_factory.mktemp("double") / "engine")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"max_seq_length": 8}, ValueError, "invalid argument: max_seq_length"),
        ({"max_batch_size": 9}, ValueError, "greater than the engine's"),
        ({"max_num_tokens": 65}, ValueError, "greater than the engine's"),
        ({"tensor_parallel_size": 2}, ValueError, "tensor_parallel_size 2 is not the engine's 1"),
        ({"pipeline_parallel_size": 2}, ValueError, "pipeline_parallel_size 2 is not"),
        ({"max_batch_size": "8"}, ValueError, "max_batch_size='8' is no int"),
        ({"guided_decoding_backend": "outlines"}, ValueError, "guided_decoding_backend='outlines'"),
        ({"guided_decoding_backend": "llguidance"}, ValueError, "Unsupported guided decoding"),
        ({"kv_cache_config": {"max_tokens": 8}}, ValueError, "is no KvCacheConfig"),
        ({"tokenizer": "/nowhere"}, OSError, "no tokenizer.json"),
    ],
)
def test_the_llm_refuses_what_the_engine_is_not(
    engine: Path, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    from tensorrt_llm._tensorrt_engine import LLM

    with pytest.raises(error, match=re.escape(said)):
        LLM(str(engine), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("KvCacheConfig", {"free_gpu_mem_fraction": 0.5}, ValueError),
        ("KvCacheConfig", {"free_gpu_memory_fraction": 1.5}, ValueError),
        ("KvCacheConfig", {"max_attention_window": [None]}, ValueError),
        ("SchedulerConfig", {"capacity_scheduler_policy": "GUARANTEED"}, ValueError),
        ("GuidedDecodingParams", {"json_schema": "{}"}, TypeError),
        ("GuidedDecodingParams", {"json": "{}", "regex": "a"}, ValueError),
        ("SamplingParams", {"max_new_tokens": 3}, TypeError),
        ("SamplingParams", {"max_tokens": 3.0}, TypeError),
        ("SamplingParams", {"top_p": 1.1}, ValueError),
        ("SamplingParams", {"top_k": -1}, ValueError),
        ("SamplingParams", {"temperature": -0.1}, ValueError),
        ("SamplingParams", {"seed": -1}, ValueError),
        ("SamplingParams", {"n": 2}, ValueError),
        ("SamplingParams", {"stop_token_ids": (1, 2)}, TypeError),
    ],
)
def test_a_value_is_refused_as_its_class_refuses_it(
    name: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    import tensorrt_llm.llmapi

    with pytest.raises(error):
        getattr(tensorrt_llm.llmapi, name)(**arguments)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "said"),
    [
        ([5] * 2040, {"max_tokens": 9}, ValueError, "should not exceed max_seq_len"),
        ((5, 6), {}, TypeError, "list of int"),
        ([5], {"end_id": None}, ValueError, "end_id"),
        ([5], {"logprobs": 1}, ValueError, "gather_generation_logits=True"),
        ([5], {"embedding_bias": torch.zeros(3)}, AssertionError, "must be float32"),
        ([5], {"guided_decoding": True}, RuntimeError, "guided decoding is not configured"),
    ],
)
def test_a_request_is_refused_as_1_2_1_refuses_it(
    engine: Path, prompt: Any, params: dict[str, Any], error: type[Exception], said: str
) -> None:
    from tensorrt_llm import SamplingParams
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.llmapi import GuidedDecodingParams

    if params.get("guided_decoding"):
        params = {"guided_decoding": GuidedDecodingParams(json_object=True)}
    llm = LLM(str(engine))
    try:
        with pytest.raises(error, match=said):
            llm.generate_async(prompt, SamplingParams(**{"end_id": 2, "max_tokens": 4, **params}))
    finally:
        llm.shutdown()


def test_the_default_is_greedy_32_tokens_and_seed_0(engine: Path) -> None:
    from tensorrt_llm import SamplingParams
    from tensorrt_llm._tensorrt_engine import LLM

    llm = LLM(str(engine))
    try:
        greedy = SamplingParams(end_id=511)
        first = llm.generate_async([5, 6], greedy).result().outputs[0]
        assert len(first.token_ids) == 32 and first.finish_reason == "length"
        sampled = SamplingParams(end_id=511, temperature=2.0)
        one, two = (llm.generate_async([5, 6], sampled).result().outputs[0] for _ in range(2))
        assert one.token_ids == two.token_ids != first.token_ids
    finally:
        llm.shutdown()


def test_an_abort_of_a_stream_with_logprobs_kills_the_worker(engine: Path) -> None:
    from tensorrt_llm import SamplingParams
    from tensorrt_llm._tensorrt_engine import LLM

    llm = LLM(str(engine), gather_generation_logits=True)
    try:
        params = SamplingParams(end_id=2, ignore_eos=True, max_tokens=1500, logprobs=1)
        result = llm.generate_async([5], params, streaming=True)
        next(result)
        result.abort()
        for _ in result:
            pass
        assert result.outputs[0].finish_reason == "cancelled"
        with pytest.raises(RuntimeError, match="the worker crashed"):
            llm.generate_async([5], SamplingParams(end_id=2))
    finally:
        llm.shutdown()


def test_the_double_is_never_found_by_accident() -> None:
    assert str(DOUBLES) in sys.path, "this module's fixture put it there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if "doubles" not in path])
        patch.delitem(sys.modules, "tensorrt_llm", raising=False)
        with pytest.raises(ModuleNotFoundError):
            __import__("tensorrt_llm")
