"""A quantised Hugging Face checkpoint, as conversion fills it: shards, their index, config.json.

ModelOpt's unified layout, which TensorRT-LLM's PyTorch backend, vLLM and SGLang read, or that of
compressed-tensors. A sink beside rank_files.py's: the same pass, the same numbers, other names.
What each tensor becomes is plan/hf_layout.py's business.
Source: nvidia-modelopt 0.47, torch/export; the `model.safetensors.index.json` of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from enginehouse.build.convert.hf_config_out import hf_config, quantization_files
from enginehouse.build.convert.rank_file import RankFile, Stored
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.forms.weight_forms import OutputTensor
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.hf_layout import HfLayout
from enginehouse.build.quantize.pieces import Pieces
from enginehouse.build.source import SourceCheckpoint

MAX_SHARD_BYTES = 5_000_000_000


class HfCheckpoint:
    """Satisfies `rank_files.Sink`. Memory: what one tensor takes apart, beside the tensor."""

    def __init__(
        self,
        plan: BuildPlan,
        source: SourceCheckpoint,
        directory: Path,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._plan = plan
        self._source = source
        self._directory = directory
        self._layout = HfLayout(plan.config, plan.settings.layout, plan.scale_dtype)
        table = self._layout.table(output_tensors(plan.config, 0, plan.scale_dtype))
        self._shards = plan_shards(table, max_shard_bytes)
        self._file_of: dict[str, RankFile] = {}
        with ExitStack() as stack:
            for name, shard in self._shards.items():
                file = RankFile(directory / name, shard, {"format": "pt"})
                stack.callback(file.close)
                self._file_of.update(dict.fromkeys(shard, file))
            self._open = stack.pop_all()

    def put(self, pp_rank: int, name: str, pieces: Pieces) -> list[Stored]:
        layout, tensor = self._layout, pieces.whole()
        if layout.waits_for_factors(name):
            return []
        parts = layout.tensors(name, tensor)
        norm = layout.norm_of(name)
        if norm is not None:
            parts[layout.row(norm).sources[0]] = self._norm(norm, tensor)
        elif self._is_norm_plus_one(name):
            parts = {source: self._norm(name, None) for source in parts}
        return [self._file_of[part].write(part, value) for part, value in parts.items()]

    def _is_norm_plus_one(self, name: str) -> bool:
        return name.endswith(".weight") and self._layout.row(name).recipe == "plus_one"

    def _norm(self, target: str, factors: Tensor | None) -> Tensor:
        """The source's norm, times the factors if there are any, rounded once.

        It is read again: in TensorRT-LLM's form Gemma's norms have been rounded with one added.
        """
        row = self._layout.row(target)
        dtype: torch.dtype = getattr(torch, self._plan.config.dtype)
        weight = self._source.tensors.read(row.sources[0])
        if factors is None:
            return weight.to(dtype)
        if row.recipe == "plus_one":
            return ((weight.float() + 1) * factors.float() - 1).to(dtype)
        return (weight.to(dtype).float() * factors.float()).to(dtype)

    def holds(self, stored: Stored) -> bool:
        file = self._file_of.get(stored.name)
        return file is not None and file.path.name == stored.file and file.holds(stored)

    def take(self, folder: Path, stored: Stored) -> bool:
        file = self._file_of.get(stored.name)
        known = file is not None and file.path.name == stored.file
        return known and file is not None and file.take(folder / stored.file, stored)

    def finish(self) -> None:
        for file in dict.fromkeys(self._file_of.values()):
            file.finish()
        if len(self._shards) > 1:
            sizes = [item.num_bytes for shard in self._shards.values() for item in shard.values()]
            weight_map = {
                name: file for file, shard in self._shards.items() for name in sorted(shard)
            }
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            self._write_json("model.safetensors.index.json", index)
        config = hf_config(self._plan, self._source)
        quantization = quantization_files(self._plan)
        if quantization is not None:
            if quantization.file is not None:
                self._write_json("hf_quant_config.json", quantization.file)
            config["quantization_config"] = quantization.inline
        self._write_json("config.json", config)

    def _write_json(self, name: str, data: Mapping[str, Any]) -> None:
        text = json.dumps(data, indent=2, ensure_ascii=False)
        (self._directory / name).write_text(text + "\n", encoding="utf-8")

    def __enter__(self) -> HfCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.close()


def plan_shards(
    table: Mapping[str, OutputTensor], max_bytes: int
) -> dict[str, dict[str, OutputTensor]]:
    """Files and what each holds, in the order of the table: one `model.safetensors` where that
    suffices, else as many as it takes; a tensor larger than max_bytes has a file of its own.
    """
    shards: list[dict[str, OutputTensor]] = [{}]
    held = 0
    for name, item in table.items():
        if shards[-1] and held + item.num_bytes > max_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = item
        held += item.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": shard for i, shard in enumerate(shards, 1)}
