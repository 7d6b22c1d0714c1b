"""The engines that tests of gunicorn serve; a test's own settings are its server's."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginehouse.runtime.cpu.compiler import has_compiler
from makers.engines import build_endless_engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_endless_engine(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="session")
def quick_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what asks much: the same model, by compiled kernels where there is a compiler."""
    backend = "cpu" if has_compiler() else "torch"
    return build_endless_engine(tmp_path_factory.mktemp("quick"), backend=backend)
