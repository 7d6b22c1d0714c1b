"""A checkpoint becomes an engine directory: tokenizer, manifest, and nothing of Python's.

The rank files are the engine that the torch backend runs; trtllm_build.py compiles them further.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from msgspec.structs import replace
from tokenizers import Tokenizer

from enginehouse.build.checkpoint import SourceCheckpoint
from enginehouse.build.plan import BuildPlan
from enginehouse.runtime.engine import (
    MANIFEST,
    MANIFEST_FORMAT,
    FileRecord,
    Limits,
    Manifest,
    ModelRecord,
    engine_digest,
    hash_files,
)
from enginehouse.runtime.errors import CheckpointError

# Where an engine is put or how far a build goes says nothing of the engine itself.
_NOT_CHOICES = ("output", "until", "model", "workers")

_TENSORRT_ONLY = ("plan_layers", "bake_weights")


def choices(plan: BuildPlan) -> dict[str, Any]:
    """Every choice that shapes the engine, settled: what a later build is compared with."""
    settled = asdict(plan.settings)
    settled |= {
        "name": plan.name,
        "max_seq_len": plan.max_seq_len,
        "max_num_tokens": plan.max_num_tokens,
        "trtllm_build": plan.builder_flags,
        "group_size": plan.group_size,
        "dtype": plan.config.dtype,
    }
    unset = {key for key in _TENSORRT_ONLY if not settled[key]}
    return {k: value for k, value in settled.items() if k not in unset.union(_NOT_CHOICES)}


def compile_torch(
    plan: BuildPlan,
    source: SourceCheckpoint,
    directory: Path,
    source_record: Mapping[str, Any],
    files: dict[str, FileRecord] | None = None,
) -> Manifest:
    """What makes a checkpoint folder with tokenizer an engine: its manifest, not yet written.

    source_record: where the weights came from, with their digest. files: the folder's, where
    they are known.
    """
    settings = plan.settings
    if files is None:
        names = [path.name for path in directory.iterdir() if path.name != MANIFEST]
        files = hash_files(directory, names)
    return Manifest(
        format=MANIFEST_FORMAT,
        name=Path(settings.output).name if settings.output else plan.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        backend="torch",
        model=ModelRecord(
            plan.name,
            source.eos_token_ids,
            source.license,
            settings.price_input,
            settings.price_output,
        ),
        limits=Limits(
            max_seq_len=plan.max_seq_len,
            max_batch_size=settings.max_batch_size,
            max_num_tokens=plan.max_num_tokens,
            kv_block_size=settings.kv_block_size,
            kv_cache_gib=settings.kv_cache_gib,
            compute_dtype=settings.compute_dtype,
            max_attention_window=plan.max_attention_window,
        ),
        source=dict(source_record),
        choices=choices(plan),
        versions={
            "enginehouse": version("enginehouse"),
            "python": platform.python_version(),
            "torch": version("torch"),
            "tokenizers": version("tokenizers"),
        },
        files=files,
        digest=engine_digest(files),
    )


def hf_manifest(
    plan: BuildPlan, source: SourceCheckpoint, directory: Path, source_record: Mapping[str, Any]
) -> Manifest:
    """What a Hugging Face checkpoint is known again by; nothing here runs it."""
    return replace(compile_torch(plan, source, directory, source_record), backend="none")


def write_tokenizer(source: SourceCheckpoint, directory: Path) -> None:
    """Put tokenizer and chat template into the engine; first of all, as it is soon refused.

    Raises CheckpointError when there is no tokenizer or none that can be read, and for a template
    that no server could use.
    """
    source.write_tokenizer(directory)
    path = directory / "tokenizer.json"
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"tokenizer.json of {source.path} is no tokenizer: {reason}; download it again"
        ) from None
    template = directory / "chat_template.jinja"
    if template.exists():
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.read_text("utf-8"))
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is not valid: {error.message} (line {error.lineno}); "
                "mend chat_template.jinja or tokenizer_config.json of the checkpoint"
            ) from None
