"""An engine directory's manifest: what was built, of what, with which choices, file by file.

The rank files are the engine that the torch backend runs; other backends compile them further.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.choices import choices
from enginehouse.build.source import SourceCheckpoint
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


def engine_manifest(
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
