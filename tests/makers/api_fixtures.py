"""A server in this process with a scripted engine: fixtures of every test of the HTTP side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from gevent.pywsgi import WSGIHandler, WSGIServer

from doubles.scripted_client import ScriptedClient
from enginehouse.server.app import create_app
from enginehouse.server.settings import ServerSettings
from makers.text_engine import engine_info, write_text_engine
from makers.token_outputs import STOP, tokens


class SocketHandler(WSGIHandler):
    """Tells the socket as gunicorn does."""

    def get_environ(self) -> dict[str, Any]:
        return {**super().get_environ(), "gunicorn.socket": self.socket}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    engine_dir = tmp_path_factory.mktemp("engines") / "tiny-engine"
    write_text_engine(engine_dir)
    return ServerSettings(engine_dir, "ipc://unused", "tiny/chat", max_body_bytes=100_000)


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(engine_info(), tokens("the lazy dog", STOP))


@pytest.fixture
def http(settings: ServerSettings, engine: ScriptedClient) -> FlaskClient:
    return create_app(settings, engine).test_client()


@pytest.fixture
def address(settings: ServerSettings, engine: ScriptedClient) -> Iterator[tuple[str, int]]:
    """A real server on a loopback port."""
    app = create_app(settings, engine)
    server = WSGIServer(("127.0.0.1", 0), app, handler_class=SocketHandler, log=None)
    server.start()
    yield server.address
    server.stop(timeout=1)
