"""The checkpoint that a build for TensorRT-LLM keeps beside its engine, to be compiled again.

    NAME.checkpoint            the checkpoint, with a manifest: the CPU backend runs it as it is
    NAME                       the engine

Knows nothing of trtllm-build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from enginehouse.build.convert.output_folder import refuse_foreign
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.choices import choices
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.engine import Engine, read_engine, verify_files
from enginehouse.runtime.errors import EngineError, PlanError

_SUFFIX = ".checkpoint"


# Choices that a checkpoint's tensors know nothing of: changing them converts nothing again.
_OF_THE_ENGINE = (
    "max_batch_size",
    "max_num_tokens",
    "kv_block_size",
    "kv_cache_gib",
    "compute_dtype",
    "trtllm_build",
    "verify_max_mean_kl",
    "price_input",
    "price_output",
    "name",
)


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of an engine is kept."""
    return output.with_name(output.name + _SUFFIX)


def engine_path(checkpoint: Path) -> Path | None:
    """The engine that a checkpoint of this name belongs to."""
    name = checkpoint.name.removesuffix(_SUFFIX)
    return checkpoint.with_name(name) if name and name != checkpoint.name else None


def refuse_own_checkpoint(source: SourceCheckpoint, output: Path) -> None:
    """PlanError unless the checkpoint may be written beside `output`."""
    path = checkpoint_path(output)
    if path.resolve() == source.path.resolve():
        raise PlanError(
            f"{path} is the source itself; `enginehouse-build compile {path}` compiles it as it "
            "is, and another output cuts it again"
        )
    refuse_foreign(path, "convert")


def kept_checkpoint(plan: BuildPlan, record: dict[str, Any], path: Path) -> Engine | None:
    """The checkpoint that an earlier build left, when this build would convert the same again."""
    try:
        kept = read_engine(path)
        verify_files(kept)
    except EngineError:
        return None
    new, old = (
        {key: value for key, value in each.items() if key not in _OF_THE_ENGINE}
        for each in (msgspec.to_builtins(choices(plan)), kept.manifest.choices)
    )
    same = new == old and kept.manifest.source.get("digest") == record["digest"]
    return kept if same else None


def open_compilable(path: Path) -> Engine:
    """A checkpoint folder that `compile` can go on from; EngineError in one sentence."""
    checkpoint = read_engine(path)
    manifest = checkpoint.manifest
    if manifest.backend != "torch" or manifest.choices.get("backend") != "tensorrt_llm":
        raise EngineError(
            f"{path} is no checkpoint for TensorRT-LLM; make one with enginehouse-build --backend "
            "tensorrt_llm"
        )
    verify_files(checkpoint)
    return checkpoint
