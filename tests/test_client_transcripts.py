"""The script that talks to a server with other people's clients, and the page on them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from makers.paths import ROOT

CLIENTS = ROOT / "scripts" / "clients"
PAGE = (ROOT / "docs" / "clients.md").read_text()


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "client_transcripts.py"))


def test_the_page_has_a_row_for_every_client(script: dict[str, Any]) -> None:
    rows = re.findall(r"^\|[^|]+\| (with_\w+\.m?\w+) \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in script["files"]().values())


def test_the_lines_of_the_page_are_those_that_are_run() -> None:
    written = "".join(path.read_text() for path in CLIENTS.glob("with_*"))
    blocks = re.findall(r"```(?:python|js)\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        assert block in written


@pytest.mark.parametrize("status", [0, 3])
def test_a_client_that_fails_is_a_failure(
    script: dict[str, Any],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@ at $OPENAI_BASE_URL for $MODEL"\nexit {status}\n')
    uv.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    asked = ["--client", "openai", "--base-url", "http://x/v1", "--model", "m"]
    assert script["main"](asked) == (1 if status else 0)
    said = capfd.readouterr().out
    assert f"run --quiet --script {CLIENTS / 'with_openai.py'} at http://x/v1 for m" in said
    assert ("FAILED: status 3" if status else "works") in said


def test_clients_whose_runner_is_missing_are_named_and_left_out(
    script: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script["main"]([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split()[0] for line in lines] == list(script["files"]())
    for line, path in zip(lines, script["files"]().values(), strict=True):
        runner = "uv" if path.suffix == ".py" else "node or npm"
        assert f"{runner} is not installed" in line
