"""The variables by which SLURM and MPI launchers tell a process that it is a rank.

A process that inherits them without being one takes itself for a rank: importing TensorRT-LLM
then starts PMI and waits for the others.
Source: NVIDIA/TensorRT-LLM issues 2813, 1826.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

LAUNCHED = "TLLM_SPAWN_PROXY_PROCESS"  # set by trtllm-llmapi-launch
_PREFIXES = ("SLURM_", "PMI_", "PMIX_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "PRTE_", "MPI_LOCAL")


def is_rank_variable(name: str) -> bool:
    return name.startswith(_PREFIXES)


def without_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that no launcher has started."""
    return {name: value for name, value in env.items() if not is_rank_variable(name)}


def forget_ranks(env: MutableMapping[str, str]) -> list[str]:
    """Take the launchers' variables out of a process's environment; the names of what went.

    Under trtllm-llmapi-launch the process is a rank, and keeps them.
    """
    if LAUNCHED in env:
        return []
    names = sorted(env.keys() - without_ranks(env).keys())
    for name in names:
        del env[name]
    return names
