"""Builds as a whole: what is left where, what is reused, what is refused and how."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from enginehouse.build import cli
from enginehouse.build.plan.settings import load_settings
from enginehouse.build.progress import BuildProgress, Stage
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.stages import build, stages
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import MANIFEST, read_engine, verify_files
from enginehouse.runtime.errors import EngineError, PlanError, RequestError
from enginehouse.server.prompt.chat import load_chat
from enginehouse.server.text.message import ChatMessage
from makers.engines import EngineMaker, build_engine, write_tiny_checkpoint
from makers.paths import CONTRACT

SMALL = ["--max-batch-size", "4", "--max-num-tokens", "64", "--quiet"]


def test_an_engine_directory_holds_what_it_says(make_engine: EngineMaker) -> None:
    path = make_engine(quant="int4", tp=2, group_size=64)
    names = {file.name for file in path.iterdir()}
    assert names >= {"config.json", "rank0.safetensors", "rank1.safetensors", "tokenizer.json"}
    assert names >= {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert not [name for name in names if name.endswith(".py")]
    engine = read_engine(path)
    verify_files(engine)
    manifest = engine.manifest
    assert set(manifest.files) == names - {MANIFEST}
    assert manifest.choices["quant"] == "int4" and manifest.choices["tp"] == 2
    assert manifest.source["digest"].startswith("sha256:")
    assert manifest.versions["torch"] and manifest.versions["enginehouse"]
    assert manifest.verify is not None and 0 <= manifest.verify["mean_kl"] < 1
    assert engine.config.quantization.quant_algo == "W4A16_AWQ"


def test_the_same_build_again_is_up_to_date_and_another_choice_is_not(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), *SMALL]
    assert cli.main([*flags, "--quant", "int4"]) == 0
    assert "(built, sha256:" in capsys.readouterr().out
    made = (tmp_path / "e" / MANIFEST).read_text()
    assert cli.main([*flags, "--quant", "int4"]) == 0
    assert "(up to date, sha256:" in capsys.readouterr().out
    assert (tmp_path / "e" / MANIFEST).read_text() == made
    assert cli.main([*flags, "--quant", "none"]) == 0
    assert "(built, sha256:" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e"]


class Noted(BuildProgress):
    """Keeps each stage as it ended."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ended: dict[str, str] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        with super().stage(name, total, unit) as stage:
            yield stage
            self.ended[name] = stage.state(0.0).partition(",")[0]


@pytest.mark.parametrize(
    ("quant", "wanted"), [("fp8", "2 of 2 layers"), ("int4_awq", "2 of 2 layers"), ("int4", "MiB")]
)
def test_what_is_calibrated_counts_layers_and_all_else_bytes(
    tiny_source: SourceCheckpoint, tmp_path: Path, quant: str, wanted: str
) -> None:
    """The embedding's bytes are written at once, and the layers take all the time."""
    progress = Noted()
    asked = {"quant": quant, "output": str(tmp_path / "e"), "until": "convert", "calib_samples": 1}
    build(load_settings(asked), tiny_source, progress)
    assert progress.ended["convert"].endswith(wanted)
    done, _, total = progress.ended["convert"].partition(" of ")
    assert total.startswith(done), "all of it"


def test_a_changed_source_is_built_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-o", str(tmp_path / "e"), *SMALL]
    for seed in (0, 1):
        write_tiny_checkpoint(tmp_path / "m", seed=seed)
        assert cli.main([str(tmp_path / "m"), *flags]) == 0
        assert "(built" in capsys.readouterr().out


def test_a_damaged_engine_is_built_again(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), *SMALL]
    cli.main(flags)
    rank = tmp_path / "e" / "rank0.safetensors"
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1
    rank.write_bytes(data)
    with pytest.raises(EngineError, match="rank0.safetensors: its SHA-256 is not the manifest's"):
        open_executor(tmp_path / "e")
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "(built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("until", "files"),
    [
        ("plan", None),
        ("convert", {"config.json", "rank0.safetensors", "rank1.safetensors"}),
        ("compile", {"config.json", "rank0.safetensors", "rank1.safetensors", MANIFEST}),
    ],
)
def test_a_build_stops_after_the_stage_that_was_asked_for(
    tiny_source: SourceCheckpoint, tmp_path: Path, until: str, files: set[str] | None
) -> None:
    out = build_engine(tiny_source, tmp_path / "out", tp=2, until=until)
    if files is None:
        assert not out.exists()
    else:
        found = {file.name for file in out.iterdir()}
        assert found >= files and (until != "convert" or found == files)
    if until == "compile":
        assert read_engine(out).manifest.verify is None


def test_a_build_for_tensorrt_llm_leaves_a_checkpoint_and_the_command_that_finishes_it(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--backend", "tensorrt_llm", *SMALL]
    assert cli.main([*flags, "--quant", "fp8", "--tp", "4"]) == 3
    out = capsys.readouterr().out
    command = out.splitlines()[-1]
    assert command.startswith(f"trtllm-build --checkpoint_dir {tmp_path}/e.checkpoint")
    assert "--max_input_len 2048 --max_batch_size 4" in command
    names = {file.name for file in (tmp_path / "e.checkpoint").iterdir()}
    assert names >= {"config.json", *(f"rank{i}.safetensors" for i in range(4)), "tokenizer.json"}
    assert not (tmp_path / "e").exists(), "nothing that looks like an engine"


def test_every_flag_of_the_printed_command_is_one_that_trtllm_build_knows(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = json.loads((CONTRACT / "trtllm_build_flags.json").read_text())
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--backend", "tensorrt_llm", *SMALL]
    cli.main(flags)
    command = capsys.readouterr().out.splitlines()[-1]
    used = re.findall(r"--(\w+)", command)
    assert len(used) > 8 and set(used) <= set(known)


def test_a_build_that_loses_too_much_fails_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--quant", "int4", *SMALL]
    assert cli.main([*flags, "--verify-max-mean-kl", "0.0000001"]) == 2
    error = capsys.readouterr().err
    assert "mean KL divergence" in error and "at most 1e-07 is accepted" in error
    assert list(tmp_path.iterdir()) == []


def test_verification_catches_scrambled_weights(
    tiny_source: SourceCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent garbage: nibbles packed in the wrong order give an engine that loads well."""
    from enginehouse.build.forms.quantization import quantize_int4
    from enginehouse.build.quantize import units
    from enginehouse.runtime.checkpoint.packing import pack_int4

    def swapped(q, group_size, dtype):  # type: ignore[no-untyped-def]
        result = quantize_int4(q, group_size, dtype)
        return result._replace(q=result.q.view(-1, 2, q.shape[1]).flip(1).reshape(q.shape))

    honest = build_engine(tiny_source, tmp_path / "honest", quant="int4")
    monkeypatch.setattr(units, "quantize_int4", swapped)
    assert pack_int4 is units.pack_int4
    garbage = build_engine(tiny_source, tmp_path / "garbage", quant="int4", verify_max_mean_kl=9.0)
    figures = [read_engine(path).manifest.verify for path in (honest, garbage)]
    assert figures[0] and figures[1]
    assert figures[1]["mean_kl"] > 10 * figures[0]["mean_kl"]


def test_a_foreign_folder_is_never_replaced(tiny_source: SourceCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PlanError, match="mine holds thesis.txt"):
        build_engine(tiny_source, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_folder_with_some_other_manifest_is_foreign_too(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"name": "a web page"}')
    with pytest.raises(PlanError, match="web holds manifest.json"):
        build_engine(tiny_source, tmp_path / "web")


@pytest.mark.parametrize("until", ["convert", "compile"])
def test_a_verified_engine_is_not_replaced_by_less(
    tiny_source: SourceCheckpoint, tmp_path: Path, until: str
) -> None:
    out = build_engine(tiny_source, tmp_path / "e")
    with pytest.raises(PlanError, match="is a verified engine"):
        build_engine(tiny_source, out, until=until, quant="int4")
    verify_files(read_engine(out))


def test_an_engine_moved_aside_by_a_killed_build_comes_back(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    from enginehouse.build.convert.output_folder import unfinished

    out = build_engine(tiny_source, tmp_path / "e")
    out.rename(tmp_path / ".e.old")
    with unfinished(out, "key"):
        pass
    verify_files(read_engine(out))
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def with_template(path: Path, template: str | None) -> Path:
    """The tiny checkpoint with another chat template, or none."""
    config = json.loads((write_tiny_checkpoint(path) / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages | nosuchfilter }}"])
def test_a_template_that_no_server_could_use_is_refused_before_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    path = with_template(tmp_path / "m", template)
    assert cli.main([str(path), "-o", str(tmp_path / "e"), *SMALL]) == 2
    assert "the chat template is not valid" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_template_that_marks_text_for_training_is_taken(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    path = with_template(tmp_path / "m", template)
    out = build_engine(open_checkpoint(path), tmp_path / "e", until="compile")
    assert (out / "chat_template.jinja").read_text() == template
    assert load_chat(out).render([ChatMessage("user", "Hi")]) == "Hi"


def test_that_there_is_no_template_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_template(tmp_path / "m", None)
    assert cli.main([str(path), "-o", str(tmp_path / "e"), *SMALL[:-1], "--until", "compile"]) == 0
    assert "no chat template, as base models have none" in capsys.readouterr().err
    with pytest.raises(RequestError, match="this engine has no chat template"):
        load_chat(tmp_path / "e").render([ChatMessage("user", "Hi")])


def test_two_builds_of_one_engine_do_not_meet(
    tiny_source: SourceCheckpoint, tmp_path: Path
) -> None:
    from enginehouse.build.convert.output_folder import unfinished

    running = pytest.raises(PlanError, match="another build .* is running")
    with unfinished(tmp_path / "e", "key"), running:
        build_engine(tiny_source, tmp_path / "e")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no/such/model"], "no/such/model"),
        (["MODEL", "--tp", "3", "--no-pad"], "choose tp in 1, 2, 4, 8"),
        (["MODEL", "--pp", "9"], "choose pp in 1 to 2"),
        (["MODEL", "--max-seq-len", "4096"], "max_position_embeddings=2048"),
        (["MODEL", "--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["MODEL", "--quant", "int4", "--group-size", "32"], "choose 128, 64"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    flags = [str(tiny_checkpoint) if flag == "MODEL" else flag for flag in flags]
    assert cli.main([*flags, "-o", str(tmp_path / "e"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("enginehouse-build: ") and message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_file_is_overridden_by_flags(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("quant: fp8\nmax_batch_size: 3\nmax_num_tokens: 64\nname: tiny\n")
    flags = [str(tiny_checkpoint), "--config", str(config), "-o", str(tmp_path / "e"), "--quiet"]
    assert cli.main([*flags, "--quant", "int4"]) == 0
    manifest = read_engine(tmp_path / "e").manifest
    assert manifest.choices["quant"] == "int4"
    assert manifest.limits.max_batch_size == 3 and manifest.model.name == "tiny"


def test_an_output_that_cannot_be_written_is_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / "file" / "e"), "--quiet"]) == 2
    assert "cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("output", ["e", "new/folder/e"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    output: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert cli.main([str(tiny_checkpoint), "-o", str(tmp_path / output), *SMALL]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tokenizer_can_be_converted_but_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_checkpoint(tmp_path / "m")
    (path / "tokenizer.json").unlink()
    build_engine(open_checkpoint(path), tmp_path / "ckpt", until="convert")
    assert cli.main([str(path), "-o", str(tmp_path / "e"), *SMALL]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "m"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"until": "plan"}, "plan"),
        ({"until": "convert"}, "plan refuse fetch convert put"),
        ({"until": "compile"}, "plan refuse fetch digest reuse convert compile put"),
        ({}, "plan refuse fetch digest reuse convert compile verify put"),
        ({"backend": "tensorrt"}, "plan refuse fetch digest reuse convert compile verify put"),
        ({"backend": "tensorrt_llm"}, "plan refuse fetch digest reuse refuse convert compile"),
        ({"backend": "tensorrt_llm", "until": "convert"}, "plan refuse fetch convert put"),
        ({"format": "hf"}, "plan refuse fetch digest choose convert manifest put"),
        ({"format": "hf", "until": "plan"}, "plan"),
    ],
    ids=str,
)
def test_the_stages_of_a_build_are_chosen_from_its_settings(
    settings: dict[str, Any], names: str
) -> None:
    chosen = load_settings({"backend": "torch", **settings})
    assert " ".join(stage.name for stage in stages(chosen)) == names
