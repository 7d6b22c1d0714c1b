"""A server of a tiny engine, as it is deployed, and one conversation with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from enginehouse.regress.behaviour.asker import Known
from enginehouse.regress.behaviour.converse import converse
from enginehouse.regress.behaviour.judging import Conversation
from makers.behaviour import Recorded, connection_to, known_of
from makers.engines import build_endless_engine
from makers.gunicorn_server import Server


@pytest.fixture(scope="session")
def endless_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_endless_engine(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="session")
def served(endless_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(endless_engine, tmp_path_factory.mktemp("gunicorn") / "log")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def known(endless_engine: Path) -> Known:
    return known_of(endless_engine)


@pytest.fixture(scope="session")
def recorded(served: Server) -> Recorded:
    return Recorded(connection_to(served.url))


@pytest.fixture(scope="session")
def conversation(recorded: Recorded, known: Known) -> Conversation:
    return converse(recorded, known, recorded.ended.append)
