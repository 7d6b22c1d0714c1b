"""`enginehouse-build doctor`: what of a build and of serving works on this machine, and why not.

Facts are machine_facts.py's; each check is a pure function of them.
Source: TensorRT-LLM 1.2.1's requirements; NVIDIA/TensorRT-LLM issues 2405, 2597, 9680, 16899.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from enginehouse.build.machine_facts import Facts, gather
from enginehouse.build.tensorrt_llm.builder import TENSORRT_LLM
from enginehouse.runtime.grammar.support import TENSORRT_LLM as XGRAMMAR
from enginehouse.runtime.machine.mpi_environment import LAUNCHED, is_rank_variable

WHAT = (
    "Say what works on this machine and how to mend what does not. Exit status: 0 everything "
    "works, 3 all but TensorRT-LLM, 2 not even the CPU backend."
)
GIB = 2**30
_MIN_CUDA = 13000  # as cuDriverGetVersion counts: the wheel of 1.2.1 is built for CUDA 13


class Finding(NamedTuple):
    """mend: how to make it right; empty when it is."""

    name: str
    found: str
    mend: str = ""

    @property
    def ok(self) -> bool:
        return not self.mend


def check_python(facts: Facts) -> Finding:
    text = f"{facts.python[0]}.{facts.python[1]} on {facts.processor}"
    mend = "" if facts.python >= (3, 10) else "use Python 3.10 or newer"
    return Finding("Python", text, mend)


def check_torch(facts: Facts) -> Finding:
    found = facts.versions.get("torch")
    mend = "" if found and _numbers(found) >= (2, 9) else "install torch 2.9 or newer: make install"
    return Finding("torch", found or "none", mend)


def check_cxx(facts: Facts) -> Finding:
    mend = "install g++ or clang++, or pip install 'enginehouse[compiler]'"
    return Finding("C++ compiler", facts.cxx or "none", "" if facts.cxx else mend)


def check_room(facts: Facts) -> Finding:
    text = f"{facts.disk_free / GIB:.0f} GiB of disk, {facts.memory_free / GIB:.0f} GiB of memory"
    enough = facts.disk_free >= 2 * GIB and facts.memory_free >= 2 * GIB
    return Finding("room", text, "" if enough else "free 2 GiB of disk and of memory")


def check_trtllm_python(facts: Facts) -> Finding:
    right = facts.python in ((3, 10), (3, 12)) and facts.processor in ("x86_64", "aarch64")
    return Finding(
        "Python for TensorRT-LLM",
        f"{facts.python[0]}.{facts.python[1]} on {facts.processor}",
        ""
        if right
        else "its wheels are for Python 3.10 and 3.12 on x86_64 and aarch64: make an "
        "environment with one of them, or use the container",
    )


def check_tensorrt_llm(facts: Facts) -> Finding:
    found = facts.versions.get("tensorrt_llm")
    install = f"pip install -e '.[trtllm]' --extra-index-url https://pypi.nvidia.com, or use the \
container nvcr.io/nvidia/tensorrt-llm/release:{TENSORRT_LLM}"
    if found is None:
        return Finding("tensorrt_llm", "none", install)
    if found.partition("+")[0] != TENSORRT_LLM:
        return Finding("tensorrt_llm", found, f"engines want {TENSORRT_LLM} exactly: {install}")
    if not facts.compiled_bindings:
        stub = f"{found}, but its compiled library is missing: the package index gave the stub"
        return Finding("tensorrt_llm", stub, f"pip uninstall tensorrt-llm, then {install}")
    return Finding("tensorrt_llm", found)


def check_builder(facts: Facts) -> Finding:
    mend = "it comes with tensorrt_llm; put it on PATH or set ENGINEHOUSE_TRTLLM_BUILD"
    return Finding("trtllm-build", facts.builder or "none", "" if facts.builder else mend)


def check_tensorrt(facts: Facts) -> Finding:
    found = facts.versions.get("tensorrt")
    right = found is not None and _numbers(found)[:2] == (10, 14) and _numbers(found) >= (10, 14, 1)
    return Finding("TensorRT", found or "none", "" if right else "pip install 'tensorrt~=10.14.1'")


def check_trtllm_torch(facts: Facts) -> Finding:
    """2.9.1 up to the container's 2.10.0a0."""
    found = facts.versions.get("torch")
    right = found is not None and (2, 9, 1) <= _numbers(found) and _numbers(found)[:2] <= (2, 10)
    if found is not None and _numbers(found)[:2] == (2, 10):
        right = found.startswith("2.10.0a0")
    mend = f"tensorrt_llm {TENSORRT_LLM} wants 2.9.1 to 2.10.0a0: give it an environment of its own"
    return Finding("torch for TensorRT-LLM", found or "none", "" if right else mend)


def check_transformers(facts: Facts) -> Finding:
    found = facts.versions.get("transformers")
    mend = "" if found == "4.57.3" else f"tensorrt_llm {TENSORRT_LLM} wants 4.57.3 exactly"
    return Finding("transformers for TensorRT-LLM", found or "none", mend)


def check_xgrammar(facts: Facts) -> Finding:
    """TensorRT-LLM follows constraints with its own, whose mistakes only the same one shows."""
    found, wanted = facts.versions.get("xgrammar"), XGRAMMAR.version
    mend = f"tensorrt_llm {TENSORRT_LLM} wants {wanted} exactly: pip install xgrammar=={wanted}"
    return Finding("xgrammar for TensorRT-LLM", found or "none", "" if found == wanted else mend)


def check_driver(facts: Facts) -> Finding:
    found = facts.driver_cuda
    if found is None:
        mend = "install NVIDIA's driver; in a container, start it with --gpus all"
        return Finding("CUDA driver", "none (no libcuda.so.1)", mend)
    text = f"CUDA {found // 1000}.{found % 1000 // 10}"
    if found < _MIN_CUDA:
        return Finding("CUDA driver", text, "CUDA 13.0 is wanted: install driver 580 or newer")
    return Finding("CUDA driver", text)


def check_gpus(facts: Facts) -> Finding:
    if not facts.gpus:
        mend = "nvidia-smi lists none that CUDA_VISIBLE_DEVICES leaves; engines need SM80 or newer"
        return Finding("GPUs", "none", mend)
    kinds = sorted({(gpu.name, gpu.sm) for gpu in facts.gpus})
    text = f"{len(facts.gpus)} x " + ", ".join(f"{name} (SM{sm})" for name, sm in kinds)
    if len({gpu.sm for gpu in facts.gpus}) > 1:
        mend = "an engine runs on one SM: choose equal GPUs with CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", text, mend)
    return Finding("GPUs", text, "" if kinds[0][1] >= 80 else "bfloat16 and INT4 need SM80")


def check_gpu_memory(facts: Facts) -> Finding:
    if not facts.gpus:
        return Finding("GPU memory", "none", "see GPUs")
    least = min(facts.gpus, key=lambda gpu: gpu.free_mib / gpu.memory_mib)
    text = f"{least.free_mib:,} of {least.memory_mib:,} MiB free on GPU {least.number}"
    free = least.free_mib >= 0.9 * least.memory_mib
    mend = "other processes hold the rest: `nvidia-smi` names them; a server that was killed may \
have left its workers"
    return Finding("GPU memory", text, "" if free else mend)


def check_p2p(facts: Facts) -> Finding:
    if len(facts.gpus) < 2:
        return Finding("GPU to GPU", "one GPU or none: not needed")
    if facts.env.get("NCCL_P2P_DISABLE") == "1":
        return Finding("GPU to GPU", "switched off by NCCL_P2P_DISABLE=1")
    if facts.p2p is None:
        mend = "update the driver: `nvidia-smi topo -p2p r` should print a table"
        return Finding("GPU to GPU", "nvidia-smi says nothing of it", mend)
    wanted = {gpu.number for gpu in facts.gpus}
    pairs = broken_pairs(facts.p2p, wanted)
    if pairs:
        first, second = pairs[0]
        return Finding(
            "GPU to GPU",
            f"{len(pairs)} pairs cannot read each other, such as {first} and {second}",
            "set NCCL_P2P_DISABLE=1, else the first all-reduce may hang",
        )
    return Finding("GPU to GPU", "all pairs read each other")


def broken_pairs(table: str, wanted: set[int]) -> list[tuple[int, int]]:
    """Pairs of GPUs that `nvidia-smi topo -p2p r` does not call OK."""
    pairs = []
    for line in table.splitlines():
        words = line.split()
        row = re.fullmatch(r"GPU(\d+)", words[0]) if words else None
        if row is None or len(words) < 2 or words[1].startswith("GPU"):
            continue
        for column, word in enumerate(words[1:]):
            first = int(row[1])
            if first < column and {first, column} <= wanted and word != "OK":
                pairs.append((first, column))
    return pairs


def check_mpi(facts: Facts) -> Finding:
    if facts.mpi is None:
        mend = "apt-get install libopenmpi-dev (Debian, Ubuntu)"
        return Finding("MPI", "no libmpi.so.40 that answers", mend)
    name = facts.mpi.partition(",")[0].strip()
    version = re.match(r"Open MPI v(\d+)", name)
    if version is None:
        mend = "TensorRT-LLM hangs with it: install libopenmpi-dev and put it first in "
        return Finding("MPI", name.splitlines()[0][:60], mend + "LD_LIBRARY_PATH")
    mend = "" if int(version[1]) >= 4 else "Open MPI 4 or newer is wanted: libopenmpi-dev"
    return Finding("MPI", name, mend)


def check_numa(facts: Facts) -> Finding:
    mend = "" if facts.numa else "apt-get install libnuma1"
    return Finding("libnuma", "libnuma.so.1" if facts.numa else "none", mend)


def check_rank_variables(facts: Facts) -> Finding:
    """They hurt only where a process keeps them that no launcher has started."""
    name = "SLURM and MPI variables"
    if LAUNCHED in facts.env:
        mend = "what starts here takes itself for a rank: leave the shell, or unset it"
        return Finding(name, f"{LAUNCHED}, which trtllm-llmapi-launch sets for its ranks", mend)
    found = sorted(variable for variable in facts.env if is_rank_variable(variable))
    if not found:
        return Finding(name, "none")
    left_out = "builds, and servers on one node, leave them out"
    return Finding(name, f"{len(found)}, such as {found[0]}: {left_out}")


def check_trtllm_room(facts: Facts) -> Finding:
    mend = "" if facts.disk_free >= 30 * GIB else "30 GiB at least: TensorRT-LLM alone takes 19"
    return Finding("disk for TensorRT-LLM", f"{facts.disk_free / GIB:.0f} GiB free", mend)


def check_limits(facts: Facts) -> Finding:
    locked = "no limit" if facts.memlock is None else f"{facts.memlock // 1024:,} KiB"
    text = f"/dev/shm {facts.shm / GIB:.1f} GiB, memlock {locked}"
    enough = facts.shm >= GIB and facts.memlock is None
    mend = "in a container: --ipc host --ulimit memlock=-1 --ulimit stack=67108864"
    return Finding("shared and locked memory", text, "" if enough else mend)


HERE = (check_python, check_torch, check_room)
COMPILED = (check_cxx,)
TRTLLM: tuple[Callable[[Facts], Finding], ...] = (
    check_trtllm_python,
    check_tensorrt_llm,
    check_builder,
    check_tensorrt,
    check_trtllm_torch,
    check_transformers,
    check_xgrammar,
    check_driver,
    check_gpus,
    check_gpu_memory,
    check_p2p,
    check_mpi,
    check_numa,
    check_rank_variables,
    check_trtllm_room,
    check_limits,
)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def print_report(facts: Facts, console: Console) -> int:
    """What works here, and apart from it what a GPU machine needs; the exit status."""
    sets = (HERE, COMPILED, TRTLLM)
    here, compiled_here, trtllm = ([check(facts) for check in checks] for checks in sets)
    works = all(finding.ok for finding in here)
    word = "yes" if works else "no"
    console.print(f"plan, convert, quantise, cut for any TP x PP: {word}")
    console.print(f"serve with the CPU backend: {word}")
    console.print(_table(here, Text("wrong", "red")))
    kernels = works and all(finding.ok for finding in compiled_here)
    console.print()
    console.print(
        f"serve with the compiled CPU backend, --backend cpu: {'yes' if kernels else 'no'}"
    )
    console.print(_table(compiled_here, Text("not here", "dim")))
    wanting = [finding for finding in trtllm if not finding.ok]
    compiled = works and not wanting
    gpu_machine = facts.driver_cuda is not None or bool(facts.gpus)
    console.print()
    console.print(f"compile and serve TensorRT-LLM engines: {'yes' if compiled else 'no'}")
    if not gpu_machine:
        console.print(
            "This machine has no NVIDIA GPU, and nothing is wrong with it: what follows is for one "
            "that has."
        )
    console.print(_table(trtllm, Text("wrong", "red") if gpu_machine else Text("not here", "dim")))
    if not works:
        return 2
    return 0 if compiled else 3


def _table(findings: Sequence[Finding], unmet: Text) -> Table:
    """unmet: the mark of what is not in order."""
    table = Table("", "check", "found; how to mend it", box=None, pad_edge=False)
    for finding in findings:
        lines = [finding.found] if finding.ok else [finding.found, f"-> {finding.mend}"]
        mark = Text("ok", "green") if finding.ok else unmet
        table.add_row(mark, Text(finding.name), Text("\n".join(lines)))
    return table


def main(argv: list[str] | None = None) -> int:
    """Command line of `enginehouse-build doctor`; returns the exit status."""
    return run(argparse.ArgumentParser(prog="enginehouse-build doctor", description=WHAT), argv)


def run(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Look at this machine and report; parser gets the flags.

    Exit status: 0 everything works here, 3 all but TensorRT-LLM, 2 not even the CPU backend.
    """
    parser.add_argument("--directory", type=Path, default=Path(), help="where engines will be put")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    return print_report(gather(args.directory), console)
