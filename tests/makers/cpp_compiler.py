"""Which compilers of the kernels of backend=cpu are here, and programs that try the kernels."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from enginehouse.runtime.cpu import compiler
from enginehouse.runtime.cpu.compiler import (
    SOURCE,
    find_compiler,
    kernel_flags,
    link_flags,
    run_compiler,
)
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


def compile_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels be compiled nearly without optimising: in a third of the time."""
    monkeypatch.setattr(compiler, "kernel_flags", lambda *of: [*kernel_flags(*of), "-Og"])


def compile_program(
    source: Path, made: Path, command: Sequence[str], instructions: str, *more: str
) -> str:
    """A program that includes the kernels, compiled as these are: in two steps, see _compile there.

    more: flags behind the kernels' own; sanitizers want the libraries that these go without.
    """
    part = made.with_suffix(".o")
    flags = [*kernel_flags(command, instructions), f"-I{SOURCE}", *more]
    sanitizing = [flag for flag in more if "sanitize" in flag]
    libraries = sanitizing or link_flags(command)
    for step in (
        [*command, *flags, "-c", str(source), "-o", str(part)],
        [*command, "-O3", "-pthread", str(part), *libraries, "-o", str(made)],
    ):
        done = run_compiler(step)
        assert done.returncode == 0, done.stderr
    return str(made)
