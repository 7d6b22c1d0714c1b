"""What an engine's manifest says of its TensorRT plans, and whether they make up the decoder.

A plan here is one context class: the parts that a step runs one after another, each from a file.
Knows no package, no GPU and no file's content.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import msgspec

from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt.package import PACKAGES


class PartRecord(msgspec.Struct, frozen=True):
    """num_layers layers from first_layer on; of none, the first part is the embedding and the last
    the head. files: one for all ranks, or one for each in their order; parts that are alike share.
    """

    first_layer: int
    num_layers: int
    files: list[str]

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)

    def file(self, rank: int) -> str:
        return self.files[rank if len(self.files) > 1 else 0]


class PlanRecord(msgspec.Struct, frozen=True):
    """A context class: its parts in the order in which they run, and what it takes at most."""

    context: int
    batch: int
    chunk: int
    prefill_batch: int
    max_positions: int
    parts: list[PartRecord]


class Built(msgspec.Struct, frozen=True):
    """The manifest's `tensorrt`: which package compiled the plans, for which SMs, and whether
    weights are inputs of the plans or constants in them.
    """

    package: str
    version: str
    targets: list[int]
    weights: Literal["inputs", "constants"]
    plans: list[PlanRecord]

    @property
    def baked(self) -> bool:
        return self.weights == "constants"


def read_built(engine: Engine) -> Built:
    """What the manifest says of the plans; EngineError when that is no whole decoder."""
    path, manifest = engine.path, engine.manifest
    try:
        built = msgspec.convert(manifest.tensorrt, Built)
    except msgspec.ValidationError as error:
        raise EngineError(
            f"{path}'s manifest does not describe its TensorRT plans: {error}; build it again"
        ) from None
    parts = [part for plan in built.plans for part in plan.parts]
    missing = {file for part in parts for file in part.files} - manifest.files.keys()
    if missing or not built.plans or built.package not in PACKAGES:
        raise EngineError(
            f"{path}'s manifest names the package {built.package!r} and {len(built.plans)} plans, "
            f"of whose files {len(missing)} are not in the engine; wanted {' or '.join(PACKAGES)} "
            "and one plan or more: build it again"
        )
    ranks = engine.config.mapping.world_size
    wanted = ranks if built.baked else 1
    for part in parts:
        if len(part.files) != wanted:
            raise EngineError(
                f"{path} has weights as {built.weights} and {len(part.files)} files for a part of "
                f"its plans; wanted {wanted} for {ranks} ranks: build it again"
            )
    num_layers = engine.config.num_hidden_layers
    for plan in built.plans:
        if not _is_decoder(plan.parts, num_layers):
            found = ", ".join(f"{part.first_layer}+{part.num_layers}" for part in plan.parts)
            raise EngineError(
                f"{path}'s plan for {plan.context} tokens has parts of the layers {found or 'none'}"
                f" (first+number); wanted an embedding 0+0, all of {num_layers} layers in turn and "
                f"a head {num_layers}+0, or 0+{num_layers} alone: build it again"
            )
    return built


def _is_decoder(parts: Sequence[PartRecord], num_layers: int) -> bool:
    """Whether the parts are one of all layers, or embedding, layers and head in their order."""
    counts = [part.num_layers for part in parts]
    if len(parts) < 2:
        return counts == [num_layers] and parts[0].first_layer == 0
    *firsts, end = accumulate(counts, initial=0)
    in_turn = [part.first_layer for part in parts] == firsts and end == num_layers
    return in_turn and counts[0] == counts[-1] == 0 and min(counts[1:-1], default=0) > 0


def plans_for(built: Built, max_seq_len: int) -> list[PlanRecord]:
    """The plans that a context of max_seq_len needs, the shortest first."""
    plans = sorted(built.plans, key=lambda plan: plan.context)
    needed = sum(plan.context < max_seq_len for plan in plans) + 1
    return plans[:needed]


def rank_files(plans: Sequence[PlanRecord], rank: int) -> list[str]:
    """The plan files that a rank runs, each once."""
    return list(dict.fromkeys(part.file(rank) for plan in plans for part in plan.parts))
