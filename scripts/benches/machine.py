"""What a decode step must read and compute, and what the machine could do: the limit of its time.

`limits.cpp` measures the machine; it is compiled as the kernels are. What must be read and computed
stands in the description of a packed network.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.cpu.compiler import find_compiler
from enginehouse.runtime.cpu.instructions import cpu_words
from enginehouse.runtime.cpu.kernel_sizes import BYTES_PART
from enginehouse.runtime.cpu.packed_file import Network
from enginehouse.runtime.cpu.structures import linear_bytes

_SOURCE = Path(__file__).with_name("limits.cpp")
_FLAGS = ("-std=c++20", "-O3", "-pthread")
_BEYOND_CACHES = 1 << 30
# What is measured where /proc/cpuinfo lists these words, the fastest of a kind first. Tiles are no
# limit of kernels that do not use them.
_PEAKS = {
    "int8:avx512_vnni": ("avx512f", "avx512_vnni"),
    "int8:avx_vnni": ("avx2", "avx_vnni"),
    "int8:avx2": ("avx2",),
    "bf16:avx512_bf16": ("avx512f", "avx512_bf16"),
    "float32:avx512f": ("avx512f",),
    "float32:fma": ("avx2", "fma"),
    "int8:amx_int8": ("amx_tile", "amx_int8"),
    "bf16:amx_bf16": ("amx_tile", "amx_bf16"),
}


class Work(NamedTuple):
    """Of one decode step: bytes of weights, of keys and values, and operations by arithmetic."""

    weight_bytes: float
    kv_bytes: float
    operations: dict[str, float]


class Limits(NamedTuple):
    """bytes_s: read again and again, as many as the weights have. memory_s: beyond all caches.
    operations_s: by instruction.
    """

    bytes_s: float
    memory_s: float
    operations_s: dict[str, float]

    def seconds(self, work: Work) -> float:
        """The least that a step takes: it reads, and meanwhile it computes."""
        reading = (work.weight_bytes + work.kv_bytes) / self.bytes_s
        counts = work.operations.items()
        return max(reading, sum(count / self.peak(kind) for kind, count in counts))

    def peak(self, arithmetic: str) -> float:
        """Operations a second, in float32 where no instruction has this type."""
        for kind in (arithmetic, "float32"):
            names = [name for name in self.operations_s if name.startswith(f"{kind}:")]
            if names:
                return max(self.operations_s[name] for name in names)
        return float("inf")


def step_work(network: Network, batch: int, context: int) -> Work:
    """Of so many sequences with so many tokens each, no window on any layer."""
    weight_bytes, operations = 0.0, {"int8": 0.0, "bf16": 0.0}
    for linear in network.linears.values():
        sizes = linear_bytes(linear)
        weight_bytes += sizes["weight"] + sizes["scales"]
        kind = "int8" if linear.input in BYTES_PART else "bf16"
        operations[kind] += 2.0 * batch * linear.out * linear.inputs
    pairs, layers = batch * context, [of for of in network.of_layers if of.kv_heads]
    operations["bf16"] += 4.0 * pairs * network.heads * sum(of.head_size for of in layers)
    kept = 2 if network.kept == "bf16" else 1  # bytes
    kv_bytes = 2.0 * pairs * sum(of.kv_heads * of.head_size for of in layers) * kept
    return Work(weight_bytes, kv_bytes, operations)


def measure_limits(folder: Path, threads: int, weight_bytes: float) -> Limits:
    """Takes about ten seconds. Raises EngineError without a compiler."""
    program = folder / "limits"
    subprocess.run([*find_compiler(), *_FLAGS, str(_SOURCE), "-o", str(program)], check=True)
    words = cpu_words()
    names = [name for name, wanted in _PEAKS.items() if words.issuperset(wanted)]
    sizes = [str(int(weight_bytes)), str(_BEYOND_CACHES)]
    command = [str(program), str(threads), *sizes, *names]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = {name: 1e9 * float(value) for name, value in map(str.split, said.splitlines())}
    return Limits(found[sizes[0]], found[sizes[1]], {name: found[name] for name in names})
