"""Packages for other people's programs: got by their own means, or why they cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_LIMIT_S = 600
# An index that is not there is no reason to wait: npm's own defaults are minutes.
_SOON = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000")


class NotHere(Exception):
    """What a program needs and cannot be had, in words."""


def clean_environment() -> dict[str, str]:
    """Ours, without what would put our packages before a program's own."""
    ours = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ours.pop("PYTHONSAFEPATH", None)  # a script imports what lies beside it
    return ours


def have(asked: Sequence[str], cwd: Path | None = None) -> str:
    """Do what gets packages, and return what it prints. Raises NotHere."""
    try:
        done = subprocess.run(
            asked,
            cwd=cwd,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NotHere(f"its packages did not come in {_LIMIT_S} s") from error
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split())[:300]
        raise NotHere(f"its packages cannot be had: {Path(asked[0]).name} says: {told}")
    return done.stdout


def npm_install(folder: Path, *packages: str) -> None:
    """Packages, or what package.json in that folder names. Raises NotHere."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise NotHere("node or npm is not installed")
    quiet = ("--no-fund", "--no-audit", "--loglevel=error")
    have([npm, "install", *quiet, *_SOON, *packages], cwd=folder)
