"""Which instruction set the kernels are compiled for: the best that this CPU has.

native/vectors.h, pairs.h and amx.h differ by it. Knows names and flags, not the compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from enginehouse.runtime.errors import EngineError

VARIABLE = "ENGINEHOUSE_CPU_INSTRUCTIONS"

# Best first: the compiler's flags, and what /proc/cpuinfo must list. plain is C++ for any CPU, with
# the vectors that each of its kind has.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_BF16 = (
    (*(f"-m{word}" for word in _AVX512), "-mfma", "-mavx512bf16", "-mavx512vnni"),
    (*_AVX512, "fma", "avx512_bf16", "avx512_vnni"),
)
_AMX = ("amx_tile", "amx_bf16")
_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512_amx": (
        (*_BF16[0], *(f"-m{word.replace('_', '-')}" for word in _AMX)),
        (*_BF16[1], *_AMX),
    ),
    "avx512_bf16": _BF16,
    "avx512_vnni": (
        (*(f"-m{word}" for word in _AVX512), "-mfma", "-mavx512vnni"),
        (*_AVX512, "fma", "avx512_vnni"),
    ),
    "avx512": ((*(f"-m{word}" for word in _AVX512), "-mfma"), (*_AVX512, "fma")),
    "avx2_vnni": (("-mavx2", "-mfma", "-mavxvnni"), ("avx2", "fma", "avx_vnni")),
    "avx2": (("-mavx2", "-mfma"), ("avx2", "fma")),
    "neon_bf16": (("-march=armv8.2-a+dotprod+bf16+i8mm",), ("asimddp", "bf16", "i8mm")),
    "neon_dotprod": (("-march=armv8.2-a+dotprod",), ("asimddp",)),
    "plain": ((), ()),
}
INSTRUCTIONS = tuple(_SETS)


def compiler_flags(instructions: str) -> tuple[str, ...]:
    """What makes the compiler use a set of `INSTRUCTIONS`."""
    return _SETS[instructions][0]


def available(words: set[str]) -> list[str]:
    """The sets that a CPU with these words in /proc/cpuinfo has, best first."""
    return [name for name, (_, wanted) in _SETS.items() if words.issuperset(wanted)]


def choose_instructions() -> str:
    """The best set of this CPU, or the one that ENGINEHOUSE_CPU_INSTRUCTIONS names.

    Raises EngineError for a name that is none, or that this CPU lacks.
    """
    found = available(cpu_words())
    asked = os.environ.get(VARIABLE)
    if not asked:
        return found[0]
    if asked not in found:
        raise EngineError(f"{VARIABLE}={asked}; wanted one that this CPU has: {', '.join(found)}")
    return asked


def cpu_words() -> set[str]:
    """What /proc/cpuinfo lists; nothing where there is none, or where it is of another kind."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64", "aarch64") or not cpuinfo.exists():
        return set()
    words = set(cpuinfo.read_text(errors="replace").split())
    return words.difference(_AMX) if "amx_tile" in words and not _tiles_are_allowed() else words


def _tiles_are_allowed() -> bool:
    """Whether Linux lets this process use AMX's tiles, for which it wants to be asked."""
    ask = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, ask)) == 0)
