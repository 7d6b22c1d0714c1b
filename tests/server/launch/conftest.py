"""The engine that every test of gunicorn serves; a test's own settings are its server's."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from enginehouse.build.sources.hf_checkpoint import open_checkpoint
from makers.engines import build_engine, write_tiny_checkpoint


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends a greedy answer by itself: its end token scores 0, always."""
    directory = tmp_path_factory.mktemp("endless")
    path = write_tiny_checkpoint(directory / "tiny-llama")
    tensors = load_file(path / "model.safetensors")
    for token_id in open_checkpoint(path).eos_token_ids:
        tensors["lm_head.weight"][token_id] = 0
    save_file(tensors, path / "model.safetensors")
    return build_engine(open_checkpoint(path), directory / "engine", quant="int4")
