"""The TensorRT-LLM checkpoint as conversion fills it: config.json and a rank file per GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from enginehouse.build.convert.rank_file import RankFile, Stored
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.quantize.pieces import Pieces
from enginehouse.runtime.checkpoint.sharding import config_of, shard_piece


class Sink(Protocol):
    """Where converted tensors go. Threads may call `put` and `holds` at once."""

    def put(self, pp_rank: int, name: str, pieces: Pieces) -> Sequence[Stored]:
        """A tensor of a pipeline stage by its TensorRT-LLM name, uncut; what was stored of it."""

    def holds(self, stored: Stored) -> bool:
        """Whether this is on the disk still, of an earlier run."""

    def take(self, folder: Path, stored: Stored) -> bool:
        """Copy this from another folder of the same files; false where it is not as written."""

    def finish(self) -> None:
        """All tensors were put: write what goes beside them."""


class RankFiles:
    """Cuts each tensor and puts each tensor-parallel rank's part into its file."""

    def __init__(self, plan: BuildPlan, directory: Path) -> None:
        self._config = plan.config
        self._directory = directory
        self._files: dict[str, RankFile] = {}
        mapping = plan.config.mapping
        with ExitStack() as stack:
            for pp_rank in range(mapping.pp_size):
                table = output_tensors(plan.config, pp_rank, plan.scale_dtype)
                for tp_rank in range(mapping.tp_size):
                    path = self._path(pp_rank, tp_rank)
                    self._files[path.name] = RankFile(path, table)
                    stack.callback(self._files[path.name].close)
            self._open = stack.pop_all()

    def put(self, pp_rank: int, name: str, pieces: Pieces) -> list[Stored]:
        ranks = range(self._config.mapping.tp_size)
        writers = [self._files[self._path(pp_rank, rank).name].begin(name) for rank in ranks]
        row, config = 0, config_of(name, self._config, pp_rank)
        for piece in pieces.parts:
            for rank, writer in zip(ranks, writers, strict=True):
                part = shard_piece(name, piece, row, pieces.shape, config, rank)
                if len(part):
                    writer.append(part)
            row += len(piece)
        return [writer.end() for writer in writers]

    def holds(self, stored: Stored) -> bool:
        file = self._files.get(stored.file)
        return file is not None and file.holds(stored)

    def take(self, folder: Path, stored: Stored) -> bool:
        file = self._files.get(stored.file)
        return file is not None and file.take(folder / stored.file, stored)

    def finish(self) -> None:
        for file in self._files.values():
            file.finish()
        text = json.dumps(self._config.to_dict(), indent=2)
        (self._directory / "config.json").write_text(text + "\n", encoding="utf-8")

    def _path(self, pp_rank: int, tp_rank: int) -> Path:
        rank = self._config.mapping.rank(pp_rank, tp_rank)
        return self._directory / f"rank{rank}.safetensors"

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.close()
