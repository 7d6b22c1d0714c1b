"""Tiny seeded checkpoints, and engines made from them as the command line makes them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from enginehouse.build.plan.settings import load_settings
from enginehouse.build.progress import BuildProgress
from enginehouse.build.source import SourceCheckpoint
from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from enginehouse.build.stages import build
from enginehouse.runtime.cpu.compiler import has_compiler
from makers.paths import ROOT

_SCRIPT = runpy.run_path(str(ROOT / "scripts" / "tiny_checkpoint.py"))
write_tiny_checkpoint: Callable[..., Path] = _SCRIPT["write_tiny_checkpoint"]
train_tokenizer: Callable[..., Tokenizer] = _SCRIPT["train_tokenizer"]

ENDLESS = 8192  # tokens: seconds of a stream
# For what serves: a host of the compiled kernels is there in a tenth of the time that importing
# torch takes.
QUICKEST: dict[str, Any] = {"backend": "cpu" if has_compiler() else "torch", "until": "compile"}

EngineMaker = Callable[..., Path]
SourceMaker = Callable[[str], SourceCheckpoint]


def build_engine(source: SourceCheckpoint, output: Path, **settings: Any) -> Path:
    """An engine of `source` at `output`, built as the command line builds it, but calibrated with
    no more than a tiny model's scales need.
    """
    values = {
        "backend": "torch",
        "calib_samples": 4,
        "calib_length": 64,
        "max_batch_size": 8,
        "max_num_tokens": 64,
        "kv_block_size": 16,
        **settings,
    }
    build(load_settings({**values, "output": str(output)}), source, BuildProgress(quiet=True))
    return output


def engine_maker(source_of: SourceMaker, folder: Path, **defaults: Any) -> EngineMaker:
    """make(family, **settings): its engine below `folder`, built once for each choice."""
    made: dict[str, Path] = {}

    def make(name: str, **settings: Any) -> Path:
        key = f"{name} {sorted(settings.items())}"
        if key not in made:
            output = folder / str(len(made)) / name
            made[key] = build_engine(source_of(name), output, **{**defaults, **settings})
        return made[key]

    return make


def build_endless_engine(directory: Path, **settings: Any) -> Path:
    """A tiny model that never ends a greedy answer by itself: its end token scores 0, always."""
    path = write_tiny_checkpoint(directory / "tiny-llama", max_positions=ENDLESS)
    tensors = load_file(path / "model.safetensors")
    for token_id in open_checkpoint(path).eos_token_ids:
        tensors["lm_head.weight"][token_id] = 0
    save_file(tensors, path / "model.safetensors")
    choices = {**QUICKEST, "quant": "int4", **settings}
    return build_engine(open_checkpoint(path), directory / "engine", **choices)
