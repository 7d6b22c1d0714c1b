"""The process of a scripted server: `serve.py [--turns JSON]`, which prints its port.

--turns is a list of texts, said one after the other; without it the answers are those to clients,
and with it each request is told on standard error: its prompt's answer, its status, and the fields
that had no effect. It serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gevent import get_hub
from gevent.pywsgi import WSGIServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # which PYTHONSAFEPATH leaves out

from enginehouse.server.app import create_app  # noqa: E402
from enginehouse.server.settings import ServerSettings  # noqa: E402
from scripted.answers import Script, in_turns, to_clients  # noqa: E402
from scripted.engine import ScriptedEngine, write_text  # noqa: E402
from scripted.process import MODEL  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=json.loads, help="a JSON list of what is said in turn")
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder)
        engine = ScriptedEngine(folder, to_clients if turns is None else _shown(in_turns(turns)))
        kept = folder / "responses.sqlite"
        settings = ServerSettings(folder, "ipc://none", MODEL, responses_path=kept)
        app = create_app(settings, engine)
        told = app if turns is None else _told(app)
        server = WSGIServer(("127.0.0.1", 0), told, log=None)
        server.start()
        print(server.server_port, flush=True)
        get_hub().threadpool.apply(sys.stdin.read)
        server.stop(timeout=1)
        engine.close()


def _shown(script: Script) -> Script:
    """The same, each answer told when it is given."""

    def answers(prompt: str) -> Iterator[str]:
        for said in script(prompt):
            print(f"  prompt of {len(prompt)} characters -> {said}", file=sys.stderr, flush=True)
            yield said

    return answers


def _told(app: Any) -> Any:
    """The application, saying of each answer its status and the fields that had no effect."""

    def application(environ: dict[str, Any], start: Any) -> Any:
        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            ignored = dict(headers).get("X-Ignored-Fields", "")
            asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}: {status}"
            print(f"  {asked}{', ignored: ' if ignored else ''}{ignored}", file=sys.stderr)
            return start(status, headers, *more)

        return app(environ, begin)

    return application


if __name__ == "__main__":
    main()
