"""A tokenizer from another directory than the weights', for sources that have none.

TensorRT-LLM checkpoints carry no tokenizer. This file knows no tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from enginehouse.build.checkpoint import (
    TOKENIZER_FILES,
    SourceCheckpoint,
    copy_tokenizer,
    read_json,
    special_token_ids,
)
from enginehouse.runtime.errors import CheckpointError


def with_tokenizer(source: SourceCheckpoint, directory: Path) -> SourceCheckpoint:
    """`source` with the tokenizer, template and special tokens of a Hugging Face directory.

    Raises CheckpointError when that has no tokenizer.json.
    """
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{directory} has no tokenizer.json; give the Hugging Face directory of the model as "
            "tokenizer"
        )
    beside = directory / "config.json"
    eos, bos = special_token_ids(directory, read_json(beside) if beside.exists() else {})
    others = [path for path in source.files if path.name not in TOKENIZER_FILES]
    own = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    return replace(
        source,
        eos_token_ids=eos,
        bos_token_id=bos,
        files=(*others, *own),
        tokenizer_writer=lambda dest: copy_tokenizer(directory, dest),
    )


def check_tokenizer(source: SourceCheckpoint) -> None:
    """CheckpointError, before a weight is read, for a checkpoint folder without a tokenizer."""
    if source.kind == "tensorrt_llm":
        if not any(path.name == "tokenizer.json" for path in source.files):
            raise CheckpointError(
                f"{source.path} is a TensorRT-LLM checkpoint, which holds no tokenizer; give the "
                "model's Hugging Face directory with --tokenizer, or stop with --until convert"
            )
