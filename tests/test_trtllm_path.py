"""The whole path against the double: convert for four ranks, trtllm-build, gunicorn, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import build_engine
from test_gunicorn import Server, wait_until
from trtllm_double import compiled_engine, double_environment, install_double

from enginehouse.build.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = [{"role": "user", "content": "What is the time?"}]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 for four GPUs, with an FP8 KV cache, as `make engine TP=4 QUANT=fp8` converts it."""
    settings: dict[str, Any] = {
        "quant": "fp8",
        "tp": 4,
        "kv_cache_dtype": "fp8",
        "until": "compile",
    }
    settings["compute_dtype"] = "float32"  # the double's
    output = tmp_path_factory.mktemp("path") / "checkpoint"
    return build_engine(open_checkpoint(tiny_checkpoint), output, **settings)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch)
        patch.setenv("PYTHONPATH", double_environment()["PYTHONPATH"])
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = compiled_engine(
            checkpoint, folder / "engine", "--use_paged_context_fmha", "enable"
        )
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


def test_the_answers_are_the_cpu_backends(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    cpu = Server(checkpoint, tmp_path / "log.txt")
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
