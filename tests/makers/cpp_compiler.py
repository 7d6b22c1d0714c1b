"""Which compilers of the kernels of backend=cpu are here, and what a test is left out for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.errors import EngineError

COMPILERS = ("g++", "clang++", "ziglang")


def _missing() -> str | None:
    try:
        find_compiler()
    except EngineError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(_missing() is not None, reason=_missing() or "")


def choose_compiler(name: str, monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    """Let `find_compiler` find one of COMPILERS; skips the test where it is not on this machine.

    empty: a folder of no programs, which is PATH for ziglang.
    """
    if name == "ziglang":
        if importlib.util.find_spec("ziglang") is None:
            pytest.skip("no ziglang package: pip install 'enginehouse[compiler]'")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(empty))
    elif shutil.which(name) is None:
        pytest.skip(f"no {name} on PATH")
    else:
        monkeypatch.setenv("CXX", name)
