"""Special tokens that the model has not: told when planned, left out or refused, never served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from enginehouse.build import cli
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import read_engine, read_manifest, write_manifest
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import ExecutorOptions, generate
from enginehouse.runtime.request import Constraint, ConstraintKind, Request, SamplingParams
from enginehouse.runtime.tensorrt_llm.deployment import open_deployment
from makers.engines import write_tiny_checkpoint

SMALL = ["--max-batch-size", "2", "--max-seq-len", "512", "--until", "compile"]
JSON = Constraint(ConstraintKind.JSON_OBJECT, "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny checkpoint of vocab_size 512, whose tokenizer_config.json names no end."""
    path = write_tiny_checkpoint(tmp_path / "m")
    edit(path / "tokenizer_config.json", eos_token=None, chat_template=None)
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flags", [[], ["--plan"], ["--format", "hf"]])
def test_ends_beyond_the_vocabulary_are_left_out_with_a_line(
    flags: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / "generation_config.json", eos_token_id=[99999, 2, 512, -1])
    assert cli.main([str(model), "-o", str(tmp_path / "e"), *SMALL, *flags]) == 0
    words = said(capsys)
    for token_id in (99999, 512, -1):
        assert (
            f"{model / 'generation_config.json'} names {token_id} as an end of sequence, and the "
            "model has vocab_size=512: it is left out, and 2 end an answer"
        ) in words
    if flags != ["--plan"]:
        assert read_manifest(tmp_path / "e").model.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("name", "generation", "config"),
    [("generation_config.json", 512, 2), ("generation_config.json", [600, 512], 600)],
)
def test_ends_of_which_none_is_the_models_are_refused_by_file_and_number(
    name: str,
    generation: Any,
    config: int,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(model / "generation_config.json", eos_token_id=generation)
    edit(model / "config.json", eos_token_id=config)
    code = cli.main([str(model), "-o", str(tmp_path / "e"), *SMALL])
    assert code == (0 if config == 2 else 2)
    if code:
        assert said(capsys).endswith(
            f"{model / name} names 600 as an end of sequence, and the model has vocab_size=512: no "
            "answer would end; write the eos_token_id there that it was trained with"
        )
        assert not (tmp_path / "e").exists()


def test_the_only_end_stands_in_config_json_and_is_refused_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "generation_config.json").unlink()
    edit(model / "config.json", eos_token_id=512)
    assert cli.main([str(model), "-o", str(tmp_path / "e"), *SMALL]) == 2
    assert f"{model / 'config.json'} names 512 as an end of sequence" in said(capsys)


def test_a_beginning_beyond_the_vocabulary_is_left_out_and_verify_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / "config.json", bos_token_id=512)
    edit(model / "generation_config.json", bos_token_id=512)
    assert cli.main([str(model), "-o", str(tmp_path / "e"), *SMALL[:4]]) == 0
    words = f"{model / 'generation_config.json'} names 512 as the beginning of a sequence, and the"
    assert words in said(capsys)


def test_an_engine_that_names_such_an_end_is_not_opened_and_one_built_now_answers_in_json(
    model: Path, tmp_path: Path
) -> None:
    edit(model / "generation_config.json", eos_token_id=[2, 99999])
    assert cli.main([str(model), "-o", str(tmp_path / "e"), *SMALL, "--quiet"]) == 0
    executor = open_executor(tmp_path / "e", ExecutorOptions(device="cpu"))
    try:
        request = Request(1, [5, 6, 7], SamplingParams(8, 0.0, constraint=JSON))
        assert generate(executor, [request])[1]
    finally:
        executor.close()
    manifest = read_engine(tmp_path / "e").manifest
    older = msgspec.structs.replace(manifest.model, eos_token_ids=(2, 99999))
    write_manifest(tmp_path / "e", msgspec.structs.replace(manifest, model=older))
    wanted = "manifest.json names 99999 as an end of sequence, and the model has vocab_size=512; "
    with pytest.raises(EngineError, match=f"{wanted}build the engine again"):
        open_executor(tmp_path / "e")


def test_an_export_that_names_such_an_end_is_not_deployed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [str(model), "-o", str(tmp_path / "e"), *SMALL, "--format", "hf", "--quiet"]
    assert cli.main(flags) == 0
    manifest = read_manifest(tmp_path / "e")
    older = msgspec.structs.replace(manifest.model, eos_token_ids=(512,))
    write_manifest(tmp_path / "e", msgspec.structs.replace(manifest, model=older))
    deployment = "enginehouse.runtime.tensorrt_llm.deployment"
    monkeypatch.setattr(f"{deployment}.installed_version", lambda name: "1.2.1")
    with pytest.raises(EngineError, match="names 512 as an end of sequence"):
        open_deployment(tmp_path / "e", ExecutorOptions())
