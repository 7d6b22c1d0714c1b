"""The front door: its verbs, their help, and that build's verbs say what enginehouse-build says."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from enginehouse.build import cli, command, doctor
from enginehouse.verbs.main import VERBS, main
from makers.engines import EngineMaker

HEAVY = {"torch", "transformers", "numpy", "safetensors", "gguf"}


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the tests': malloc and gc stay as they are."""
    monkeypatch.setattr(command, "prepare", lambda: None)


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_screen_and_has_an_example(
    verb: str, columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = printed([*verb.split(), "--help"], capsys).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    [start] = [number for number, line in enumerate(lines) if line in ("example:", "examples:")]
    examples = [line for line in lines[start + 1 :] if line.startswith("  ")]
    assert examples and all(f"enginehouse {verb}".strip() in line for line in examples)


@pytest.mark.parametrize("verb", ["serve", "deploy", "chat", "bench", "top"])
def test_an_example_is_a_command_line_that_is_taken(verb: str) -> None:
    parser = import_module(f"enginehouse.verbs.{verb}").make_parser()
    for line in str(parser.epilog).splitlines()[1:]:
        words = shlex.split(line.partition("|")[2] or line)
        assert words[:2] == ["enginehouse", verb]
        parser.parse_args(words[2:])


def test_the_list_names_every_verb_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["--help"], capsys).splitlines()
    for verb, what in VERBS.items():
        assert f"  {verb:<9} {what}" in lines


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["--version"], capsys) == f"enginehouse {version('enginehouse')}\n"


def test_every_setting_is_in_one_group_and_what_matters_first_comes_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for group in cli.GROUPS.values() for name in group]
    assert sorted(names) == sorted(cli.BuildSettings.__dataclass_fields__)
    for words in (["build", "--help"], ["plan", "--help"], ["build", "--help-all"]):
        text = printed(words, capsys).partition("\n\n")[2]
        places = [text.index(word) for word in ("--output", "--quant", "--tp", "--backend")]
        assert places == sorted(places)
        assert all(text.index(word) > places[-1] for word in ("--pp", "--max-seq-len", "--gpu"))


def test_every_setting_is_listed_by_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["build", "--help-all"], capsys)
    for name in cli.BuildSettings.__dataclass_fields__:
        assert name == "model" or f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["srve"], "enginehouse: there is no verb 'srve'; did you mean serve?"),
        (["qqq"], "enginehouse: there is no verb 'qqq'; choose among build, plan, families"),
        (["--nope"], "enginehouse: there is no verb '--nope'; choose among"),
        ([], "usage: enginehouse VERB ..."),
    ],
)
def test_an_unknown_verb_is_refused_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_is_one_sentence(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "x", "--no-such-flag"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"enginehouse {verb}: ") and error.count("\n") == 1
    assert "--no-such-flag" in error


@pytest.mark.parametrize("verb", ["build", "compile"])
def test_a_refusal_of_build_is_the_same_sentence_in_the_verbs_name(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "none.checkpoint")]
    assert main([verb, *words]) == 2
    ours = capsys.readouterr().err
    assert cli.main([*([verb] if verb == "compile" else []), *words]) == 2
    theirs = capsys.readouterr().err
    assert ours.removeprefix(f"enginehouse {verb}: ") == theirs.removeprefix("enginehouse-build: ")
    assert ours.startswith(f"enginehouse {verb}: ") and ours.count("\n") == 1


def test_a_verbs_build_is_enginehouse_builds(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quant", "int4", "--until", "convert", "--max-seq-len", "256", "--quiet"]
    for run, name in ((cli.main, "a"), (lambda words: main(["build", *words]), "b")):
        assert run([str(tiny_checkpoint), "-o", str(tmp_path / name), *flags]) == 0
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert one and one == other
    capsys.readouterr()


def test_plan_prints_what_the_flag_prints(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_checkpoint), "--tp", "2", "--quant", "int4"]
    assert cli.main([*words, "--plan"]) == 0
    assert printed(["plan", *words], capsys).count("\n") > 5
    assert printed(["plan", *words], capsys) == (
        cli.main([*words, "--plan"]) or capsys.readouterr().out
    )


def test_doctor_reports_what_it_gathers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(doctor, "gather", lambda path: asked.append(path) or doctor.Facts())
    statuses = [run(["doctor", "--directory", str(tmp_path)]) for run in (main, cli.main)]
    out = capsys.readouterr().out
    assert statuses == [2, 2] and asked == [tmp_path, tmp_path], "not even a Python was found"
    assert out == 2 * out[: len(out) // 2]


def test_a_closed_pipe_and_ctrl_c_end_a_verb_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from enginehouse.verbs import bench

    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "main", interrupted)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "enginehouse bench: interrupted\n"
    reader, writer = os.pipe()
    os.close(reader)  # nobody will read what it prints
    command = [sys.executable, "-m", "enginehouse.verbs.main", "--help"]
    help_ = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert b"Traceback" not in help_.stderr


def test_nothing_heavy_is_loaded_by_help_or_by_serve(make_engine: EngineMaker) -> None:
    code = f"""
import sys
from enginehouse.verbs.main import main
for words in (["--help"], ["serve", "--help"], ["chat", "--help"], ["bench", "--help"],
              ["top", "--help"], ["build", "--help"], ["plan", "--help"],
              ["serve", sys.argv[1], "--dry-run"]):
    try:
        assert main(words) == 0
    except SystemExit as end:
        assert not end.code
print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(make_engine())],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert (done.returncode, done.stderr.split()) == (0, []), done.stderr
