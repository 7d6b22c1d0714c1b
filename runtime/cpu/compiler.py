"""The kernels' C++ source -> a shared library, compiled once a machine and then kept.

The compiler: CXX, else g++ or clang++ on PATH, or the ziglang package's (the extra `compiler`).
No engine directory holds code: the source lies beside this file. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import logging
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

log = logging.getLogger("enginehouse.cpu")

SOURCE = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",  # nothing is fused but by hand: tiles of all heights must round alike
    "-fvisibility=hidden",  # libraries for two instruction sets may be loaded side by side
    "-Wno-psabi",
)
# The kernels use the C++ library's headers alone: zig would build one, for a minute or more.
_LINK = ("-nodefaultlibs", "-lpthread", "-lm", "-lc", "-lgcc")
_LINK_OF_ZIG = ("-nostdlib++",)
_ZIG = ("-m", "ziglang", "c++", "-mcpu=baseline")  # its default is all that this CPU has
_LIMIT_S = 600  # seconds, on a machine that is not busy
_INSTALL = (
    "install g++ or clang++, or `pip install 'enginehouse[compiler]'`, or choose backend=torch"
)


def find_compiler() -> list[str]:
    """The command that compiles C++; EngineError where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        program = shutil.which(asked[0])
        if program is None:
            raise EngineError(f"CXX={asked[0]} is no program on PATH; correct or unset it")
        return [program, *asked[1:]]  # what it compiled is found with CXX and without
    for name in ("g++", "clang++"):
        if program := shutil.which(name):
            return [program]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, *_ZIG]
    raise EngineError(f"backend=cpu needs a C++ compiler, and none is on PATH: {_INSTALL}")


def kernel_flags(command: Sequence[str], instructions: str) -> list[str]:
    """What a compiler is told of the kernels, compiled for a set of `INSTRUCTIONS`."""
    flags = [*_FLAGS, *compiler_flags(instructions)]
    if "ziglang" in command:  # which knows -mcpu alone, in words of its own
        flags = [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in flags]
    return flags


def link_flags(command: Sequence[str]) -> Sequence[str]:
    """What a compiler links the kernels with: no C++ library."""
    return _LINK_OF_ZIG if "ziglang" in command else _LINK


def has_compiler() -> bool:
    """Whether this machine can compile the kernels."""
    try:
        find_compiler()
    except EngineError:
        return False
    return True


def compiled_library(instructions: str) -> Path:
    """The shared library for an instruction set, compiled if it is not there yet.

    Kept under what it is made of: source, compiler and flags. Raises EngineError when there is no
    compiler, or when it fails, with its first error and the place of its log.
    """
    command = find_compiler()
    flags = kernel_flags(command, instructions)
    library = cache_folder("native") / f"{_key(command, flags)}.so"
    if not library.exists():
        log.info(
            "compiling the kernels for %s with %s, once on this machine: it takes seconds",
            instructions,
            shlex.join(command),
        )
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            _compile(command, flags, library)
        except OSError as error:
            raise EngineError(
                f"{library.parent} cannot be written: {error.strerror}; set ENGINEHOUSE_CACHE"
            ) from None
    return library


def cache_folder(name: str) -> Path:
    """Where what can be made anew is kept: below ENGINEHOUSE_CACHE, else ~/.cache/enginehouse."""
    root = os.environ.get("ENGINEHOUSE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "enginehouse") / name


def run_compiler(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What a compiler does and says. Raises EngineError when it cannot be run, or does not end."""
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(cache_folder("zig"))}  # it wants one even without a HOME
    try:
        return subprocess.run(
            command,
            env={**zig, **os.environ},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{command[0]} cannot be run: {error}; {_INSTALL}") from None


def _key(command: Sequence[str], flags: Sequence[str]) -> str:
    digest = sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(run_compiler([*command, "--version"]).stdout.encode())
    digest.update("\0".join([*command, *flags, *link_flags(command)]).encode())
    return digest.hexdigest()[:32]


def _compile(command: Sequence[str], flags: Sequence[str], library: Path) -> None:
    """Under another name first: who finds the library finds it whole.

    In two steps: zig keeps what it links with by the flags it is called with, and an instruction
    set's are not among those of the second.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part, made = Path(folder) / "engine.o", Path(folder) / library.name
        steps = (
            [*command, *flags, "-c", str(SOURCE / "engine.cpp"), "-o", str(part)],
            [*command, "-O3", "-shared", str(part), *link_flags(command), "-o", str(made)],
        )
        for step in steps:
            done = run_compiler(step)
            if done.returncode:
                kept = library.with_suffix(".log")
                kept.write_text(done.stdout + done.stderr, encoding="utf-8")
                lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
                first = next((line for line in lines if "error" in line), lines[0])
                raise EngineError(
                    f"{shlex.join(command)} cannot compile the kernels of backend=cpu: "
                    f"{first.strip()}; the whole log is {kept}"
                )
        os.replace(made, library)
