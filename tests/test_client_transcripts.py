"""The scripts that let other people's clients and agents talk to a server, and the page on them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from makers.paths import ROOT

CLIENTS, AGENTS = (ROOT / "scripts" / name for name in ("clients", "agents"))
PAGE = (ROOT / "docs" / "clients.md").read_text()
# What stands in for uv: it gets packages, and says which Python has them.
UV = """#!/bin/sh
[ "$1" = sync ] && echo "no index" >&2 && exit {sync}
echo {python}
"""
PYTHON = """#!/bin/sh
echo "$@ at $OPENAI_BASE_URL for $MODEL"
exit {status}
"""
ASKED = ["--client", "openai", "--base-url", "http://x/v1", "--model", "m"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts its folder there
    return runpy.run_path(str(ROOT / "scripts" / "client_transcripts.py"))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are all that there are; the script's Python is in it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_the_page_has_a_row_for_every_client(script: dict[str, Any]) -> None:
    rows = re.findall(r"^\|[^|]+\| (with_\w+\.m?\w+) \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in script["files"]().values())


def test_the_lines_of_the_page_are_those_that_are_run() -> None:
    written = "".join(path.read_text() for path in CLIENTS.glob("with_*"))
    blocks = re.findall(r"```(?:python|js)\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        assert block in written
    for file in ("codex.toml", "claude.sh"):
        assert f"```{Path(file).suffix[1:]}\n{(AGENTS / file).read_text()}```" in PAGE


@pytest.mark.parametrize("status", [0, 3])
def test_a_client_that_fails_is_a_failure(
    script: dict[str, Any], status: int, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = alone / "python-of-the-client"
    put(alone / "uv", UV.format(sync=0, python=python))
    put(python, PYTHON.format(status=status))
    assert script["main"](ASKED) == (1 if status else 0)
    said = capsys.readouterr().out
    assert f"{CLIENTS / 'with_openai.py'} at http://x/v1 for m" in said
    assert ("FAILED: status 3" if status else "works") in said


def test_clients_whose_runner_is_missing_are_named_and_left_out(
    script: dict[str, Any], alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script["main"]([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split()[0] for line in lines] == list(script["files"]())
    for line, path in zip(lines, script["files"]().values(), strict=True):
        runner = "uv" if path.suffix == ".py" else "node or npm"
        assert f"{runner} is not installed" in line


def test_clients_whose_packages_cannot_be_had_are_named_and_left_out(
    script: dict[str, Any], alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(alone / "uv", UV.format(sync=1, python=""))
    assert script["main"](ASKED) == 0
    said = capsys.readouterr().out
    assert re.search("^openai +left out: .* uv says: no index", said, re.MULTILINE)
    put(alone / "npm", "#!/bin/sh\necho asked >> asked; echo no index >&2; exit 1\n")
    put(alone / "node", "#!/bin/sh\nexit 0\n")
    packages = script["NodePackages"](alone / "clients")
    for name in ("vercel_ai", "openai_node"):
        with pytest.raises(script["NotHere"], match="npm says: no index"):
            script["command"](CLIENTS / f"with_{name}.mjs", packages)
    assert (alone / "clients" / "asked").read_text() == "asked\n"  # once


def test_agents_without_npm_are_named_and_left_out(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    agents = runpy.run_path(str(ROOT / "scripts" / "agent_transcripts.py"))
    assert agents["main"]([]) == 0
    assert "no agent is tried: node or npm is not installed" in capsys.readouterr().out
