"""One machine -> as many replicas of an engine: which GPUs, or how many CPU threads, each has.

Knows no gunicorn. Imports no torch: gunicorn's master asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.engine import is_hf_checkpoint, read_engine, read_manifest
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.runtime.machine.cpu import default_threads
from enginehouse.runtime.machine.gpus import visible_gpus


class Share(NamedTuple):
    """flags: of the host. env: variables that it has beside its parent's."""

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = {}


def shares_of(engine: Path, num_replicas: int, env: Mapping[str, str]) -> list[Share]:
    """One for each replica; one replica has the whole machine.

    Raises EnginehouseError where there are too few GPUs.
    """
    if num_replicas == 1:
        return [Share()]
    num_gpus = gpus_of_one(engine, env)
    if not num_gpus:
        threads = max(1, default_threads() // num_replicas)
        shared = ("--shared-weights",) if env.get("ENGINEHOUSE_SHARED_WEIGHTS") != "0" else ()
        return [Share(("--num-threads", str(threads), *shared))] * num_replicas
    gpus = [gpu.uuid for gpu in visible_gpus(env)]
    if len(gpus) < num_replicas * num_gpus:
        raise EnginehouseError(
            f"{num_replicas} replicas of {engine} take {num_gpus} GPUs each, and {len(gpus)} are "
            "visible; ask for fewer --replicas, or set CUDA_VISIBLE_DEVICES"
        )
    starts = range(0, num_replicas * num_gpus, num_gpus)
    named = (",".join(gpus[start : start + num_gpus]) for start in starts)
    return [Share((), {"CUDA_VISIBLE_DEVICES": each}) for each in named]


def gpus_of_one(engine: Path, env: Mapping[str, str]) -> int:
    """0: it runs on the CPU."""
    manifest = read_manifest(engine)
    if is_hf_checkpoint(manifest):
        return int(env.get("ENGINEHOUSE_TP_SIZE") or 1)
    if manifest.backend == "cpu":
        return 0
    if manifest.backend == "torch":  # one device holds every rank of it
        return 1 if env.get("ENGINEHOUSE_DEVICE") != "cpu" and visible_gpus(env) else 0
    return read_engine(engine).config.mapping.world_size
