"""What is opened with which TensorRT-LLM, on which machine, and with which limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from doubles.trtllm_double import compiled_engine, edit_json, install_double, rewrite_manifest
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import Manifest, read_engine, read_manifest, write_manifest
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.machine.binding import check_machine, has_engines, record_machine
from enginehouse.runtime.request import Request, SamplingParams
from enginehouse.runtime.tensorrt_llm.deployment import (
    llm_arguments,
    open_deployment,
    rebuild_command,
)
from makers.engines import EngineMaker

pytestmark = pytest.mark.usefixtures("one_thread")
NO_OPTIONS = ExecutorOptions()
H100 = {
    "tensorrt_llm": "1.2.1",
    "tensorrt": "10.14.1.48",
    "cuda": "13.0",
    "sm": "90",
    "gpu": "NVIDIA H100 80GB HBM3",
}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    install_double(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="module")
def built(make_engine: EngineMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        torch_engine = make_engine(quant="none", dtype="float32", until="compile")
        return compiled_engine(torch_engine, tmp_path_factory.mktemp("open") / "engine")


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    target = tmp_path / "engine"
    target.mkdir()
    for path in built.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture(scope="module")
def checkpoint(make_engine: EngineMaker) -> Path:
    """A quantised Hugging Face directory, as --format hf makes it."""
    return make_engine(quant="fp8", format="hf")


@pytest.mark.parametrize(
    ("version", "loads"),
    [
        ("0.17.0", True),
        ("1.2.1", True),
        ("1.3.0rc1", True),
        ("1.3.0rc20", True),
        ("1.3.0rc21", False),
        ("1.3.0", False),
        ("1.4.0rc1", False),
        ("2.0.0", False),
        ("unknown", False),
    ],
)
def test_which_versions_load_engines(version: str, loads: bool) -> None:
    assert has_engines(version) is loads


def test_the_machine_is_recorded_as_it_is(double: pytest.MonkeyPatch) -> None:
    assert record_machine() == H100
    double.setenv("DOUBLE_GPU", "NVIDIA RTX PRO 6000 Blackwell, 12.0")
    assert record_machine()["sm"] == "120"


def test_a_machine_without_anything_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert record_machine() == dict.fromkeys(H100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sm": "89", "gpu": "NVIDIA L40S"}, r"GPUs of SM 90 and .* has 89 \(NVIDIA H100.*L40S\)"),
        ({"tensorrt": "10.15.0"}, "for TensorRT 10.14.1.48 and this machine has 10.15.0"),
        ({"tensorrt_llm": "1.2.0"}, "for TensorRT-LLM 1.2.1 and this machine has 1.2.0"),
        ({"sm": None}, "this machine has none"),
    ],
)
def test_another_machine_is_refused_with_the_command(
    change: dict[str, str | None], message: str
) -> None:
    with pytest.raises(EngineError, match=f"{message}.*; compile it here: build it"):
        check_machine(H100, {**H100, **change}, "build it")


def test_another_driver_or_gpu_of_the_same_kind_is_taken() -> None:
    check_machine(H100, {**H100, "cuda": "13.1", "gpu": "NVIDIA H200"}, "")


def test_an_engine_of_another_sm_is_not_loaded(engine: Path, double: pytest.MonkeyPatch) -> None:
    double.setenv("DOUBLE_GPU", "NVIDIA L40S, 8.9")
    command = "enginehouse-build .* --backend tensorrt_llm -o .*engine --quant none --tp 1 --pp 1"
    with pytest.raises(EngineError, match=command):
        open_executor(engine)


def test_the_command_of_the_manifest_is_the_one_that_is_named(
    engine: Path, double: pytest.MonkeyPatch
) -> None:
    """Choices that the made-up command would leave out are those of the checkpoint it names."""
    manifest = read_manifest(engine)
    command = "enginehouse-build compile '/some where/e.checkpoint' -o /engines/e"
    write_manifest(engine, changed(manifest, source={**manifest.source, "rebuild": command}))
    assert rebuild_command(engine, read_manifest(engine)) == command
    double.setenv("DOUBLE_GPU", "NVIDIA L40S, 8.9")
    with pytest.raises(EngineError) as refused:
        open_executor(engine)
    assert str(refused.value).endswith(f"; compile it here: {command}")


def test_without_tensorrt_llm_both_ways_out_are_named(engine: Path, checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="needs TensorRT-LLM 1.2.1, .*--backend torch"):
        open_executor(engine)
    with pytest.raises(EngineError, match="needs TensorRT-LLM 1.2.1 or later"):
        open_executor(checkpoint)


def test_an_engine_is_not_for_1_3(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_double(monkeypatch, later=True)
    message = "TensorRT-LLM 1.3.0 loads none .*tensorrt-llm==1.2.1, or .* --format hf"
    with pytest.raises(EngineError, match=message):
        open_executor(engine)


@pytest.mark.parametrize("later", [False, True])
def test_a_checkpoint_runs_on_the_pytorch_backend(
    checkpoint: Path, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    install_double(monkeypatch, later=later)
    work = [Request(1, [5, 6, 7], SamplingParams(12, temperature=0.0, ignore_eos=True))]
    executor = open_executor(checkpoint, ExecutorOptions(tp_size=2, max_batch_size=4))
    try:
        found = generate(executor, work)
        info = executor.info
    finally:
        executor.close()
    assert (info.tp_size, info.max_batch_size, info.backend) == (2, 4, "tensorrt_llm")
    assert info.quantization == "fp8"
    torch_engine = make_engine(quant="fp8", until="compile")
    options = ExecutorOptions(compute_dtype="float32", kv_cache_gib=0.03)
    assert found == generate(open_executor(torch_engine, options), work)


def test_the_pytorch_backend_of_the_double_takes_no_engine(
    engine: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_double(monkeypatch, later=True)
    from tensorrt_llm import LLM

    with pytest.raises(ValueError, match="wanted a model"):
        LLM(str(engine))
    with pytest.raises(ValueError, match="invalid argument: build_config"):
        LLM(str(checkpoint), build_config=None)
    with pytest.raises(ModuleNotFoundError):
        __import__("tensorrt_llm._tensorrt_engine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 4096}, "max_seq_len=4096 was asked for .* built for 2048"),
        ({"max_batch_size": 9}, "max_batch_size=9 was asked for .* ask for at most 8"),
        ({"max_num_tokens": 65}, "max_num_tokens=65"),
        ({"tp_size": 2}, "compiled for tp=1 and tp=2 was asked for"),
    ],
)
def test_limits_above_the_engines_are_refused(
    engine: Path, double: pytest.MonkeyPatch, options: dict[str, int], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        open_deployment(engine, ExecutorOptions(**options))


def test_smaller_limits_are_taken(engine: Path, double: pytest.MonkeyPatch) -> None:
    options = ExecutorOptions(max_seq_len=100, max_batch_size=2, max_num_tokens=32)
    found = open_deployment(engine, options)
    assert (found.max_seq_len, found.max_batch_size, found.max_num_tokens) == (100, 2, 32)
    arguments = llm_arguments(found)
    assert (arguments["max_batch_size"], arguments["max_num_tokens"]) == (2, 32)
    assert "max_seq_len" not in arguments, "the engine's own; requests are clamped here"


def test_sliding_windows_and_kv_memory_reach_the_cache(
    engine: Path, double: pytest.MonkeyPatch
) -> None:
    manifest = read_engine(engine).manifest
    limits = msgspec.structs.replace(manifest.limits, max_attention_window=(512, 2048))
    write_manifest(engine, msgspec.structs.replace(manifest, limits=limits))
    found = open_deployment(engine, ExecutorOptions(max_seq_len=1024, kv_cache_gib=0.5))
    cache = llm_arguments(found)["kv_cache_config"]
    assert cache["max_attention_window"] == [512, 1024]
    bytes_per_token = 2 * 2 * 4 * 32 * 2  # k and v, layers, heads, head size, 16 bit
    assert cache["max_tokens"] == 2**29 // bytes_per_token


def test_without_paged_context_fmha_nothing_is_reused_or_chunked(
    built: Path, make_engine: EngineMaker, double: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_engine = make_engine(quant="none", dtype="float32", until="compile")
    flags = ("--use_paged_context_fmha", "disable")
    plain = compiled_engine(torch_engine, tmp_path / "plain", *flags)
    for path, paged in ((built, True), (plain, False)):
        arguments = llm_arguments(open_deployment(path, NO_OPTIONS))
        assert arguments["enable_chunked_prefill"] is paged
        assert arguments["kv_cache_config"]["enable_block_reuse"] is paged
    open_executor(plain).close()


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    return msgspec.structs.replace(manifest, **changes)


def test_a_checkpoint_that_was_never_compiled_is_told_from_an_engine(
    make_engine: EngineMaker, double: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_engine = make_engine(quant="none", dtype="float32", until="compile")
    target = tmp_path / "e"
    target.mkdir()
    for path in torch_engine.iterdir():
        name = path.name.replace("rank0.safetensors", "rank0.engine")
        (target / name).write_bytes(path.read_bytes())
    rewrite_manifest(target, read_engine(torch_engine).manifest, backend="tensorrt_llm")
    with pytest.raises(EngineError, match="a checkpoint that was never compiled; compile it with"):
        open_executor(target)


def test_a_damaged_engine_file_is_found(engine: Path, double: pytest.MonkeyPatch) -> None:
    data = bytearray((engine / "rank0.engine").read_bytes())
    data[-1] ^= 1
    (engine / "rank0.engine").write_bytes(data)
    with pytest.raises(EngineError, match="rank0.engine: its SHA-256 is not the manifest's"):
        open_executor(engine)


def test_what_tensorrt_llm_does_not_load_is_one_sentence(
    engine: Path, double: pytest.MonkeyPatch
) -> None:
    manifest = read_engine(engine).manifest
    edit_json(engine / "config.json", version="1.2.0")
    rewrite_manifest(engine, manifest)
    message = "TensorRT-LLM does not load .*engine: engine of version 1.2.0"
    with pytest.raises(EngineError, match=message):
        open_executor(engine)


def test_an_unknown_backend_is_refused(engine: Path) -> None:
    write_manifest(engine, changed(read_manifest(engine), backend="onnx"))
    with pytest.raises(
        EngineError, match="backend 'onnx'; wanted torch, cpu, tensorrt or tensorrt_llm"
    ):
        open_executor(engine)
