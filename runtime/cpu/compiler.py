"""The kernels' C++ source -> a shared library, compiled once a machine and then kept.

The compiler: CXX, else g++ or clang++ on PATH, else the ziglang package's. No engine directory
holds code: the source lies beside this file. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from enginehouse.runtime.cpu.instructions import compiler_flags
from enginehouse.runtime.errors import EngineError

SOURCE = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",  # nothing is fused but by hand: tiles of all heights must round alike
    "-fvisibility=hidden",  # libraries for two instruction sets may be loaded side by side
    "-Wno-psabi",
)
_COMPILE_S = 600
_INSTALL = "install g++ or clang++, or `pip install ziglang`, or choose backend=torch"


def find_compiler() -> list[str]:
    """The command that compiles C++; EngineError where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise EngineError(f"CXX={asked[0]} is no program on PATH; correct or unset it")
        return asked
    for name in ("g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise EngineError(f"backend=cpu needs a C++ compiler, and none is on PATH: {_INSTALL}")


def compiled_library(instructions: str, extra_flags: Sequence[str] = ()) -> Path:
    """The shared library for an instruction set, compiled if it is not there yet.

    Kept under what it is made of: source, compiler and flags. Raises EngineError when there is no
    compiler, or when it fails, with its first error and the place of its log.
    """
    command = find_compiler()
    flags = [*_FLAGS, *compiler_flags(instructions), *extra_flags]
    library = cache_folder("native") / f"{_key(command, flags)}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile([*command, *flags], library)
        except OSError as error:
            raise EngineError(
                f"{library.parent} cannot be written: {error.strerror}; set ENGINEHOUSE_CACHE"
            ) from None
    return library


def cache_folder(name: str) -> Path:
    """Where what can be made anew is kept: below ENGINEHOUSE_CACHE, else ~/.cache/enginehouse."""
    root = os.environ.get("ENGINEHOUSE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "enginehouse") / name


def _key(command: Sequence[str], flags: Sequence[str]) -> str:
    digest = sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(_run([*command, "--version"]).stdout.encode())
    digest.update("\0".join([*command, *flags]).encode())
    return digest.hexdigest()[:32]


def _compile(command: Sequence[str], library: Path) -> None:
    """Under another name first: who finds the library finds it whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        done = _run([*command, str(SOURCE / "engine.cpp"), "-o", str(made)])
        if done.returncode:
            log = library.with_suffix(".log")
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise EngineError(
                f"{command[0]} cannot compile the kernels of backend=cpu: {first.strip()}; the "
                f"whole log is {log}"
            )
        os.replace(made, library)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{command[0]} cannot be run: {error}; {_INSTALL}") from None
