"""The GPUs of this machine as `nvidia-smi` lists them. Imports neither torch nor CUDA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from enginehouse.runtime.machine.binding import nvidia_smi

QUERY = ("index", "uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")


class Gpu(NamedTuple):
    """One GPU; memory in MiB, sm 89 is compute capability 8.9."""

    number: int
    uuid: str
    name: str
    sm: int
    memory_mib: int
    free_mib: int
    driver: str


def visible_gpus(env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """What CUDA would show: nvidia-smi's list, cut by CUDA_VISIBLE_DEVICES."""
    listing = nvidia_smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    return cut_by_environment(parse_gpus(listing or ""), env.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str) -> list[Gpu]:
    """nvidia-smi's lines of QUERY; a line of another kind (a warning, an [N/A]) is no GPU."""
    gpus = []
    for line in listing.splitlines():
        try:
            number, uuid, name, capability, total, free, driver = map(str.strip, line.split(","))
            sm = int(capability.replace(".", ""))
            gpus.append(Gpu(int(number), uuid, name, sm, int(total), int(free), driver))
        except ValueError:
            continue
    return gpus


def cut_by_environment(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order, up to the first it does not know."""
    if visible is None:
        return gpus
    found: list[Gpu] = []
    for word in (word.strip() for word in visible.split(",")):
        named = [g for g in gpus if str(g.number) == word or (word and g.uuid.startswith(word))]
        if not named:
            break
        found.append(named[0])
    return found
