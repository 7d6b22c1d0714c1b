"""The engines that tests of gunicorn serve; a test's own settings are its server's."""

from __future__ import annotations

from pathlib import Path

import pytest

from makers.engines import build_endless_engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_endless_engine(tmp_path_factory.mktemp("endless"))
