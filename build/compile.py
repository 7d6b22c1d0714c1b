"""A checkpoint becomes an engine directory: tokenizer, manifest, and nothing of Python's.

For `torch` the rank files are the engine. For `tensorrt_llm` the engines are compiled on the
GPU machine: this file knows the command that does it.
"""

from __future__ import annotations

import platform
import shlex
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
from enginehouse.build.forms import FP8_FORMS
from enginehouse.build.plan import BuildPlan
from enginehouse.runtime.engine import (
    MANIFEST,
    MANIFEST_FORMAT,
    Limits,
    Manifest,
    ModelRecord,
    engine_digest,
    hash_files,
)
from enginehouse.runtime.errors import CheckpointError

# Where an engine is put or how far a build goes says nothing of the engine itself.
_NOT_CHOICES = ("output", "until", "model")


def choices(plan: BuildPlan) -> dict[str, Any]:
    """Every choice that shapes the engine, settled: what a later build is compared with."""
    settled = asdict(plan.settings)
    settled |= {
        "name": plan.name,
        "max_seq_len": plan.max_seq_len,
        "group_size": plan.group_size,
        "dtype": plan.config.dtype,
    }
    return {key: value for key, value in settled.items() if key not in _NOT_CHOICES}


def compile_torch(
    plan: BuildPlan,
    source: SourceCheckpoint,
    directory: Path,
    source_record: Mapping[str, Any],
) -> Manifest:
    """What makes a checkpoint folder with tokenizer an engine: its manifest, not yet written.

    source_record: where the weights came from, with their digest.
    """
    settings = plan.settings
    names = [path.name for path in directory.iterdir() if path.name != MANIFEST]
    files = hash_files(directory, names)
    return Manifest(
        format=MANIFEST_FORMAT,
        name=Path(settings.output).name if settings.output else plan.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        backend=settings.backend,
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
            max_num_tokens=settings.max_num_tokens,
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


def trtllm_build_command(plan: BuildPlan, checkpoint_dir: Path, engine_dir: Path) -> str:
    """The `trtllm-build` line of TensorRT-LLM 1.2.1 for this plan, ready to paste.

    max_input_len is max_seq_len: its default of 1024 would refuse longer prompts. FP8 leaves
    the GEMM plugin off, as TensorRT's own FP8 products are the faster ones.
    """
    settings = plan.settings
    flags = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": engine_dir,
        "max_seq_len": plan.max_seq_len,
        "max_input_len": plan.max_seq_len,
        "max_batch_size": settings.max_batch_size,
        "max_num_tokens": max(settings.max_num_tokens, 8192),
        "gemm_plugin": "disable" if settings.quant in FP8_FORMS else "auto",
        "gpt_attention_plugin": "auto",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "kv_cache_type": "paged",
        "use_paged_context_fmha": "enable",
        "workers": 1,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return shlex.join(["trtllm-build", *words])
