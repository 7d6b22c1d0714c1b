"""What doctor says of machines that are made up, and of this one."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from enginehouse.build import cli, machine_facts
from enginehouse.build.doctor import HERE, TRTLLM, print_report
from enginehouse.build.machine_facts import Facts
from enginehouse.runtime.machine.gpus import Gpu, cut_by_environment, parse_gpus
from enginehouse.runtime.machine.mpi_environment import without_ranks

GIB = 2**30
H100 = Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", 90, 81559, 81000, "580.65.06")
P2P = (
    " \tGPU0\tGPU1\tGPU2\n GPU0\tX\tOK\t{}\n GPU1\tOK\tX\tOK\n GPU2\t{}\tOK\tX\n\n"
    "Legend:\n  X    = Self\n  OK   = Status Ok\n"
)
GOOD = Facts(
    python=(3, 12),
    processor="x86_64",
    versions={
        "torch": "2.9.1+cu130",
        "tensorrt_llm": "1.2.1",
        "tensorrt": "10.14.1.48",
        "transformers": "4.57.3",
        "xgrammar": "0.1.25",
    },
    compiled_bindings=True,
    builder="/opt/bin/trtllm-build",
    cxx="/usr/bin/g++",
    driver_cuda=13010,
    gpus=(H100, H100._replace(number=1), H100._replace(number=2)),
    p2p=P2P.format("OK", "OK"),
    mpi="Open MPI v4.1.2, package: Debian OpenMPI, ident: 4.1.2",
    numa=True,
    env={"PATH": "/usr/bin"},
    disk_free=500 * GIB,
    memory_free=100 * GIB,
    shm=64 * GIB,
    memlock=None,
)


def report(facts: Facts) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    status = print_report(facts, console)
    return status, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_gpu_machine_in_order_passes_every_check() -> None:
    status, text = report(GOOD)
    assert status == 0 and "wrong" not in text
    assert "compile and serve TensorRT-LLM engines: yes" in text


def versions(**changed: str | None) -> dict[str, Any]:
    return {"versions": {**GOOD.versions, **changed}}


@pytest.mark.parametrize(
    ("changed", "check", "mend"),
    [
        ({"python": (3, 11)}, "Python for TensorRT-LLM", "Python 3.10 and 3.12"),
        ({"processor": "ppc64le"}, "Python for TensorRT-LLM", "x86_64 and aarch64"),
        (versions(tensorrt_llm=None), "tensorrt_llm", ".[trtllm]"),
        (versions(tensorrt_llm="1.3.0rc21"), "tensorrt_llm", "engines want 1.2.1 exactly"),
        ({"compiled_bindings": False}, "tensorrt_llm", "pip uninstall tensorrt-llm"),
        ({"builder": None}, "trtllm-build", "ENGINEHOUSE_TRTLLM_BUILD"),
        (versions(tensorrt=None), "TensorRT", "tensorrt~=10.14.1"),
        (versions(tensorrt="10.15.0"), "TensorRT", "tensorrt~=10.14.1"),
        (versions(torch="2.13.0"), "torch for TensorRT-LLM", "2.9.1 to 2.10.0a0"),
        (versions(torch="2.10.0"), "torch for TensorRT-LLM", "2.9.1 to 2.10.0a0"),
        (versions(torch="2.9.0"), "torch for TensorRT-LLM", "2.9.1 to 2.10.0a0"),
        (versions(xgrammar="0.2.8"), "xgrammar for TensorRT-LLM", "xgrammar==0.1.25"),
        (versions(transformers="5.0"), "transformers for TensorRT-LLM", "4.57.3 exactly"),
        ({"driver_cuda": None}, "CUDA driver", "--gpus all"),
        ({"driver_cuda": 12080}, "CUDA driver", "driver 580"),
        ({"gpus": ()}, "GPUs", "CUDA_VISIBLE_DEVICES"),
        ({"gpus": (H100._replace(sm=75),)}, "GPUs", "SM80"),
        ({"gpus": (H100, H100._replace(sm=89))}, "GPUs", "one SM"),
        ({"gpus": (H100._replace(free_mib=20000),)}, "GPU memory", "nvidia-smi"),
        ({"p2p": P2P.format("CNS", "CNS")}, "GPU to GPU", "NCCL_P2P_DISABLE=1"),
        ({"p2p": None}, "GPU to GPU", "topo -p2p"),
        ({"mpi": None}, "MPI", "libopenmpi-dev"),
        ({"mpi": "MPICH Version:\t4.0"}, "MPI", "hangs with it"),
        ({"mpi": "Open MPI v3.1.0, x"}, "MPI", "Open MPI 4 or newer"),
        ({"numa": False}, "libnuma", "libnuma1"),
        ({"env": {"TLLM_SPAWN_PROXY_PROCESS": "1"}}, "SLURM and MPI variables", "unset it"),
        ({"disk_free": 20 * GIB}, "disk for TensorRT-LLM", "30 GiB"),
        ({"shm": 64 << 20}, "shared and locked memory", "--ipc host"),
        ({"memlock": 8 << 20}, "shared and locked memory", "memlock=-1"),
    ],
)
def test_one_thing_that_is_wrong_is_named_with_its_remedy(
    changed: dict[str, Any], check: str, mend: str
) -> None:
    facts = replace(GOOD, **changed)
    wrong = [found for found in (one(facts) for one in (*HERE, *TRTLLM)) if not found.ok]
    assert check in [found.name for found in wrong]
    assert any(mend in found.mend for found in wrong if found.name == check)
    follows = {"GPU memory"} if check == "GPUs" else set()
    assert {found.name for found in wrong} <= {check} | follows
    status, text = report(facts)
    assert (
        status == 3
        and mend in text.replace("\n", " ")
        and "serve with the CPU backend: yes" in text
    )


def test_a_machine_without_a_gpu_is_told_first_what_works_and_nothing_is_called_wrong() -> None:
    laptop = Facts(
        python=(3, 11),
        processor="x86_64",
        versions={"torch": "2.13.0"},
        disk_free=50 * GIB,
        memory_free=8 * GIB,
        memlock=8 << 20,
    )
    status, text = report(laptop)
    assert status == 3 and "wrong with it" in text and text.count("wrong") == 1
    lines = text.splitlines()
    assert lines[:2] == [
        "plan, convert, quantise, cut for any TP x PP: yes",
        "serve with the CPU backend: yes",
    ]
    [middle] = [n for n, line in enumerate(lines) if "TensorRT-LLM engines: no" in line]
    [compiled] = [n for n, line in enumerate(lines) if line.endswith("--backend cpu: no")]
    first, kernels, second = lines[2:compiled], lines[compiled:middle], lines[middle:]
    assert any("install g++ or clang++" in line for line in kernels)
    assert sum(line.startswith("ok ") for line in first) == len(HERE)
    assert not any(line.startswith("not here") for line in first)
    assert sum(line.startswith("not here") for line in second) >= 8


def test_with_a_gpu_what_is_missing_is_wrong() -> None:
    text = report(replace(GOOD, mpi=None))[1]
    assert "wrong" in text and "not here" not in text and "no NVIDIA GPU" not in text


@pytest.mark.parametrize(
    "changed",
    [
        versions(torch="2.10.0a0+git"),
        {"p2p": P2P.format("NS", "NS"), "env": {"NCCL_P2P_DISABLE": "1"}},
        {"p2p": P2P.format("NS", "NS"), "gpus": GOOD.gpus[:2]},
        {"p2p": None, "gpus": GOOD.gpus[:1]},
        {"env": {"SLURM_JOB_ID": "1", "PMI_RANK": "0"}},
    ],
)
def test_what_is_in_order_is_not_called_wrong(changed: dict[str, Any]) -> None:
    assert report(replace(GOOD, **changed))[0] == 0


def test_variables_that_every_start_leaves_out_are_told_and_not_called_wrong() -> None:
    status, text = report(replace(GOOD, env={"SLURM_JOB_ID": "1", "PMI_RANK": "0"}))
    assert status == 0
    assert "2, such as PMI_RANK: builds, and servers on one node, leave them out" in text


@pytest.mark.parametrize(
    "changed", [{"python": (3, 9)}, versions(torch=None), versions(torch="2.8"), {"disk_free": GIB}]
)
def test_a_machine_that_cannot_even_run_the_cpu_backend_has_status_2(
    changed: dict[str, Any],
) -> None:
    status, text = report(replace(GOOD, **changed))
    assert status == 2 and "serve with the CPU backend: no" in text


def test_this_machine_can_run_the_cpu_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) in (0, 3)
    assert "plan, convert, quantise, cut for any TP x PP: yes" in capsys.readouterr().out


def test_a_stub_is_told_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tensorrt_llm", raising=False)
    assert not machine_facts._has_bindings()
    (tmp_path / "tensorrt_llm" / "bindings.cpython-312-x86_64-linux-gnu.so").write_text("")
    assert machine_facts._has_bindings()


def test_a_library_that_hangs_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_facts, "_LIBRARY_S", 0.2)
    assert machine_facts._library("import time; time.sleep(60)") is None
    monkeypatch.undo()
    assert machine_facts._library("print(7)") == "7\n"
    assert machine_facts._library("import ctypes; ctypes.CDLL('libnosuch.so.40')") is None


LISTING = """\
0, GPU-aa, NVIDIA H100 80GB HBM3, 9.0, 81559, 81000, 580.65.06
1, GPU-ab, NVIDIA L4, 8.9, 23034, [N/A], 580.65.06
2, GPU-bc, NVIDIA B200, 10.0, 183359, 183000, 580.65.06
Failed to initialize something
"""


def test_gpus_are_read_from_the_drivers_list() -> None:
    gpus = parse_gpus(LISTING)
    assert gpus[0] == H100
    assert [(gpu.number, gpu.sm) for gpu in gpus] == [(0, 90), (2, 100)]


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [(None, [0, 2]), ("2,0", [2, 0]), ("GPU-bc", [2]), ("0,7,2", [0]), ("", []), ("-1", [])],
)
def test_cuda_visible_devices_cuts_the_list(visible: str | None, numbers: list[int]) -> None:
    assert [gpu.number for gpu in cut_by_environment(parse_gpus(LISTING), visible)] == numbers


def test_only_what_makes_a_process_a_rank_is_left_out() -> None:
    ours = {"PATH": "/bin", "OMPI_ALLOW_RUN_AS_ROOT": "1", "TLLM_LOG_LEVEL": "INFO"}
    ranks = {"SLURM_PROCID": "0", "PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}
    assert without_ranks({**ours, **ranks}) == ours
    assert os.environ.get("PATH"), "the real environment is not touched"
