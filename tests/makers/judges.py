"""Outside judges of the API: llm-comply's checks and the specifications that it brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gevent
import llm_comply
from flask.testing import FlaskClient
from gevent.pywsgi import WSGIServer
from llm_comply.config import ComplianceConfig
from llm_comply.http import close_client
from llm_comply.result import TestResult as Result
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader


@cache
def specification(name: str) -> SpecLoader:
    """`openresponses`, `anthropic`, `openai_chat`."""
    return SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / f"{name}.json"))


@contextmanager
def served(http: FlaskClient) -> Iterator[str]:
    """The application on a loopback port; its address."""
    server = WSGIServer(("127.0.0.1", 0), http.application, log=None)
    server.start()
    try:
        yield f"http://127.0.0.1:{server.address[1]}"
    finally:
        close_client()
        server.stop(timeout=1)


def judged(url: str, model: str, case: Any, spec: SpecLoader) -> Result:
    """One of llm-comply's checks, in a thread of its own: it knows no gevent."""
    config = ComplianceConfig(f"{url}/v1", "-", model, timeout=20)

    def run() -> Result:
        return Runner(config, [case], spec).run_one(case)

    result: Result = gevent.get_hub().threadpool.spawn(run).get(timeout=60)
    return result
