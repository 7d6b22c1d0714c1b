"""The whole path against the double: enginehouse-build for four ranks, gunicorn, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from doubles.trtllm_double import double_environment, install_double
from enginehouse.build import cli, doctor
from enginehouse.runtime.engine import read_engine, verify_files
from makers.gunicorn_server import Server, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = [{"role": "user", "content": "What is the time?"}]
EXACT = ("generation_tokens", "prompt_tokens")
LATE = ("engine_generation_tokens", "engine_prompt_tokens", "iterations")
FLAGS = ["--backend", "tensorrt_llm", "--tp", "4", "--quant", "fp8", "--kv-cache-dtype", "fp8"]
FLAGS += ["--max-batch-size", "8", "--kv-block-size", "16", "--quiet"]
FLAGS += ["--compute-dtype", "float32"]  # the double's


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make engine TP=4 QUANT=fp8 BACKEND=tensorrt_llm` runs: converted, compiled, checked."""
    output = tmp_path_factory.mktemp("path") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        patch.setenv("PMI_RANK", "0")  # as in a job of SLURM
        assert cli.main([str(tiny_checkpoint), *FLAGS, "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        patch.setenv("PYTHONPATH", double_environment()["PYTHONPATH"])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PMI_RANK", "0")
        server = Server(engine, folder / "log.txt")
        yield server
        ranks = [p for p in psutil.Process(server.process.pid).children(recursive=True)]
        assert server.stop() == 0, server.log.read_text()
        wait_until(lambda: not any(p.is_running() and _is_rank(p) for p in ranks), "no ranks left")


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "time.sleep(3600)" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def answers(server: Server) -> list[str]:
    """Streamed greedy answers; each piece of text as it came, put together."""
    found = []
    with server.client() as client:
        model = client.models.list().data[0].id
        for question in ("What is the time?", "How far is it to the sea?"):
            pieces = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=24,
                temperature=0,
                stream=True,
            )
            texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
            found.append("".join(texts))
    return found


def test_the_engine_is_four_ranks_whose_answer_was_checked(engine: Path) -> None:
    found = read_engine(engine)
    verify_files(found)
    manifest = found.manifest
    assert {f"rank{rank}.engine" for rank in range(4)} <= manifest.files.keys()
    assert (manifest.backend, found.config.mapping.tp_size) == ("tensorrt_llm", 4)
    assert found.config.quantization.quant_algo == "FP8"
    assert manifest.machine is not None and manifest.machine["sm"] == "90"
    assert manifest.verify is not None and manifest.verify["num_tokens"] == 24
    assert 0 <= manifest.verify["max_gap"] < 0.1
    log = engine.with_name("engine.trtllm-build.log").read_text()
    assert "building Unnamed Network 3 on NVIDIA H100" in log


def test_too_few_gpus_are_refused_before_anything_is_converted(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_double(monkeypatch)
    monkeypatch.setenv("DOUBLE_GPUS", "2")
    assert cli.main([str(tiny_checkpoint), *FLAGS, "-o", str(tmp_path / "e")]) == 2
    assert "2 of the 4 GPUs that this engine runs on are visible" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_doctor_sees_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_double(monkeypatch)
    facts = doctor.gather(tmp_path)
    assert [(gpu.number, gpu.sm, gpu.memory_mib) for gpu in facts.gpus] == [
        (number, 90, 81559) for number in range(8)
    ]
    assert doctor.check_gpus(facts) == ("GPUs", "8 x NVIDIA H100 80GB HBM3 (SM90)", "")
    assert doctor.check_gpu_memory(facts).ok
    assert doctor.check_p2p(facts).found == "all pairs read each other"
    assert facts.builder is not None and doctor.check_builder(facts).ok
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [gpu.number for gpu in doctor.gather(tmp_path).gpus] == [3, 1]


def test_the_answers_are_the_cpu_backends(server: Server, engine: Path, tmp_path: Path) -> None:
    """Of the checkpoint that the engine was compiled of."""
    cpu = Server(engine.with_name("engine.checkpoint"), tmp_path / "log.txt")
    try:
        wanted = answers(cpu)
    finally:
        cpu.stop()
    assert answers(server) == wanted and all(wanted)


def test_guided_json_is_json(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    with server.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=QUESTION,
            temperature=0,
            max_tokens=200,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "found", "schema": schema, "strict": True},
            },
        )
    text = answer.choices[0].message.content
    assert text is not None and list(json.loads(text)) == ["ok"]


def test_statistics_are_the_engines_and_the_servers(server: Server) -> None:
    """The engine's arrive once a second, so the last question's may be among them."""

    def count(what: str) -> float:
        return server.metric(f"enginehouse_{what}_total")

    before = {name: count(name) for name in (*EXACT, *LATE)}
    with server.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=QUESTION,
            max_tokens=9,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert answer.usage is not None and answer.usage.completion_tokens == 9
    asked = {"generation_tokens": 9, "prompt_tokens": answer.usage.prompt_tokens}
    assert {name: count(name) - before[name] for name in EXACT} == asked
    for name, least in zip(LATE, (9, answer.usage.prompt_tokens, 9), strict=True):
        wait_until(lambda n=name, m=least: count(n) >= before[n] + m, name)  # type: ignore[misc]
    assert server.metric("enginehouse_kv_cache_blocks") > 0


def test_a_client_that_goes_away_frees_the_engine(server: Server) -> None:
    with server.client() as client:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=QUESTION,
            max_tokens=1500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        wait_until(lambda: server.metric("enginehouse_num_requests_running") == 1, "it runs")
        stream.close()
    wait_until(lambda: server.metric("enginehouse_num_requests_running") == 0, "the engine is free")


def test_a_checkpoint_without_an_engine_is_served_over_the_gpus_that_are_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--format hf`, by TensorRT-LLM's PyTorch backend of 1.3."""
    install_double(monkeypatch, later=True)
    monkeypatch.setenv("PYTHONPATH", double_environment(later=True)["PYTHONPATH"])
    monkeypatch.setenv("ENGINEHOUSE_TP_SIZE", "2")
    output = tmp_path / "hf"
    flags = ["--format", "hf", "--quant", "none", "--max-batch-size", "8", "--quiet"]
    assert cli.main([str(tiny_checkpoint), *flags, "-o", str(output)]) == 0
    served = Server(output, tmp_path / "log.txt")
    try:
        assert all(answers(served))
        log = (tmp_path / "log.txt").read_text()
        assert "2 x 1  (tensorrt_llm backend)" in log
    finally:
        assert served.stop() == 0
