"""A conversion that several machines share: each converts some of the units, one joins them.

A share is a folder beside the output: the checkpoint's files with holes where other shares' tensors
are, what was written by whom (units.jsonl, the journal's), and of which build it is a share
(share.json). Joining copies every tensor into an unfinished build, checked by its digest on the
way; that build then goes on as one that was interrupted after its last unit does, and ends in the
same bytes as one that was never shared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch

from enginehouse.build.convert.conversion import convert_units
from enginehouse.build.convert.journal import ERRORS, UNITS, Journal
from enginehouse.build.convert.rank_files import Sink
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.quantize.units import (
    Calibration,
    by_layer,
    source_bytes,
    units,
)
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import PlanError

SHARE = "share.json"
_FOLDER = re.compile(r"\.shard-(\d+)-of-(\d+)$")


@dataclass(frozen=True, slots=True)
class Share:
    """The index-th of count, from 1 on."""

    index: int
    count: int

    def folder(self, output: Path) -> Path:
        return output.with_name(f"{output.name}.shard-{self.index}-of-{self.count}")


class ShareRecord(msgspec.Struct, frozen=True):
    """share.json. key: of the build; the shares of one have the same, on whatever machine."""

    index: int
    count: int
    key: str


def parse_share(text: str) -> Share:
    """`2/4`; PlanError for anything else."""
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text, re.ASCII)
    share = Share(int(found[1]), int(found[2])) if found else Share(0, 0)
    if not 1 <= share.index <= share.count:
        raise PlanError(f"--shard {text}: wanted I/N, a share of N from 1/N to N/N, such as 2/4")
    return share


def share_key(plan: BuildPlan, record: Mapping[str, Any]) -> str:
    """Of all that shapes a tensor, and of the source by its digest: machines may settle what runs
    the engine, and how, each as it can.
    """
    config, settings = plan.config, plan.settings
    model = [config.to_dict(), asdict(config.mapping), plan.unpadded.to_dict(), plan.scale_dtype]
    form = [settings.quant, plan.group_size, settings.format, settings.layout, settings.dequantize]
    parts = [version("enginehouse"), model, form, record["digest"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def check_shared(plan: BuildPlan, source: SourceCheckpoint) -> None:
    """PlanError for a form whose layers wait for each other."""
    if by_layer(plan.config.quantization) and source.quantized is None:
        raise PlanError(
            f"quant={plan.settings.quant} rounds each layer on what the layers before it give, so "
            "that a share would have to do those too; choose none, int4, fp8_rowwise or another "
            "form that is not calibrated layer by layer, or leave --shard out"
        )


def share_of(plan: BuildPlan, source: SourceCheckpoint, share: Share) -> set[str]:
    """Keys of the units of a share: one after the other, about as many bytes in each share."""
    sizes = unit_sizes(plan, source)
    total, before, keys = max(1, sum(sizes.values())), 0, set()
    for key, size in sizes.items():
        middle = (2 * before + size) / (2 * total)
        if min(share.count - 1, int(middle * share.count)) == share.index - 1:
            keys.add(key)
        before += size
    return keys


def unit_sizes(plan: BuildPlan, source: SourceCheckpoint) -> dict[str, int]:
    """Bytes that each unit reads; where no weight is here, as the model's dtype has them."""
    if source.has_weights:
        return {
            unit.key: sum(source_bytes(row, source) for row in unit.rows)
            for unit in units(plan.config, source)
        }
    shapes, config = expected_shapes(plan.unpadded), plan.config
    width = getattr(torch, config.dtype).itemsize
    return {
        unit.key: width * sum(prod(shapes[name]) for row in unit.rows for name in row.sources)
        for unit in units(config, source)
    }


def convert_share(
    plan: BuildPlan,
    source: SourceCheckpoint,
    sink: Sink,
    keys: set[str],
    journal: Journal,
    advance: Callable[[str, int], None],
) -> None:
    """The share's units into the sink, but for those that the journal knows to be finished."""
    finished = journal.finished(sink, lambda _: None)
    left = [u for u in units(plan.config, source) if u.key in keys and u.key not in finished]
    convert_units(plan, source, sink, Calibration({}), advance, journal, left)


def put_record(folder: Path, share: Share, key: str, journal: Journal) -> None:
    """What makes the folder a share, beside the checkpoint's files."""
    journal.copy_to(folder)
    record = ShareRecord(share.index, share.count, key)
    (folder / SHARE).write_bytes(msgspec.json.encode(record) + b"\n")


def refuse_foreign_share(folder: Path) -> None:
    """Never replace what is no share."""
    if folder.exists() and not (folder / SHARE).is_file():
        raise PlanError(f"{folder} is there and is no share; move it away")


def find_shares(output: Path, key: str) -> list[Path]:
    """The folders of all shares of this build; PlanError where one is missing or another's."""
    found: dict[int, dict[int, Path]] = {}
    for path in output.parent.glob(f"{output.name}.shard-*"):
        if match := _FOLDER.search(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise PlanError(
            f"there are no shares {output.name}.shard-I-of-N beside {output}; make them with "
            "--shard 1/N to N/N and the same settings, and bring them here"
        )
    if len(found) > 1:
        raise PlanError(
            f"beside {output} are shares of {' and of '.join(map(str, sorted(found)))}; move those "
            "of other cuts away"
        )
    ((count, folders),) = found.items()
    missing = [index for index in range(1, count + 1) if index not in folders]
    if missing:
        raise PlanError(
            f"of {count} shares of {output} {len(missing)} are missing: "
            f"{', '.join(f'{index}/{count}' for index in missing[:8])}; bring them here first"
        )
    for index, path in sorted(folders.items()):
        try:
            record = msgspec.json.decode((path / SHARE).read_bytes(), type=ShareRecord)
        except (OSError, msgspec.DecodeError) as error:
            raise PlanError(
                f"{path / SHARE} cannot be read ({error}); make the share again"
            ) from None
        if record != ShareRecord(index, count, key):
            raise PlanError(
                f"{path} is a share of another build: of other settings, another source or another "
                f"version; make it again with --shard {index}/{count}"
            )
    return [folders[index] for index in range(1, count + 1)]


def join(folders: list[Path], sink: Sink, journal: Journal, advance: Callable[[int], None]) -> None:
    """Every tensor of the shares into the sink; PlanError for one that is not as it was written."""
    finished = journal.entries()
    for folder in folders:
        for unit, stored in Journal.read_units(folder / UNITS).items():
            if unit in finished:
                continue
            for item in stored:
                if not sink.take(folder, item):
                    raise PlanError(
                        f"{folder}: {item.name} in {item.file} is not as it was written; bring the "
                        "share here again, or make it again"
                    )
                advance(item.num_bytes)
            journal.record(unit, stored)
        journal.errors.extend(folder / ERRORS)


def size_of(folders: list[Path]) -> int:
    """Bytes of the shares' tensors."""
    every: Iterator[int] = (
        item.num_bytes
        for folder in folders
        for stored in Journal.read_units(folder / UNITS).values()
        for item in stored
    )
    return sum(every)
