"""The wheel of this checkout, built in a copy of what it is made from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from makers.paths import ROOT

FLOORS = {
    **{name: ROOT / name for name in ("build", "runtime", "server")},
    **{name: ROOT / "scripts" / name for name in ("regress", "verbs")},
}


def build_wheel(directory: Path) -> Path:
    """Made in `directory`; setuptools must not have written into the copy's build/."""
    pytest.importorskip("setuptools")
    pytest.importorskip("wheel")
    copy, dist = directory / "checkout", directory / "dist"
    for folder in FLOORS.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, copy / folder.relative_to(ROOT), ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    before = set((copy / "build").iterdir())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(dist), "."],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert set((copy / "build").iterdir()) == before, "setuptools wrote into build/"
    [wheel] = dist.iterdir()
    return wheel
