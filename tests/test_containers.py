"""The container recipes, read instruction by instruction. No image is built here."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from enginehouse.server.launch.launcher import main
from makers.paths import ROOT

RECIPES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def instructions(recipe: str) -> list[tuple[str, str]]:
    """(instruction, its words) in order; continued lines are joined, comments left out."""
    lines = (ROOT / recipe).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            found.append((word, " ".join(rest.split())))
    return found


def only(recipe: str, wanted: str) -> str:
    [words] = [words for word, words in instructions(recipe) if word == wanted]
    return words


def ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a file out of the context: its last line that fits decides."""
    out, name = False, path.relative_to(ROOT).as_posix()
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            parents = [name, *(p.as_posix() for p in Path(name).parents)]
            if any(fnmatch.fnmatch(p, pattern.replace("**/", "*")) for p in parents):
                out = not line.startswith("!")
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_copied_file_is_there_and_in_the_context(recipe: str) -> None:
    copied = [words.split() for word, words in instructions(recipe) if word == "COPY"]
    assert len(copied) > 4
    for *sources, _ in copied:
        for source in sources:
            path = ROOT / source
            assert path.exists(), f"{recipe} copies {source}"
            files = [path] if path.is_file() else list(path.glob("*.*"))
            assert files and not any(ignored(file) for file in files)
    needed = {source for *sources, _ in copied for source in sources}
    folders = {"build", "runtime", "server", "scripts/regress", "scripts/verbs", "configs"}
    assert {"setup.cfg", "pyproject.toml", *folders} <= needed
    assert ignored(ROOT / "scripts" / "gpu_check.py")
    assert ignored(ROOT / ".git" / "HEAD") and ignored(ROOT / "engines" / "x" / "rank0.engine")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_server_is_no_root_and_gets_the_signal_itself(recipe: str) -> None:
    words = [word for word, _ in instructions(recipe)]
    user = only(recipe, "USER")
    assert user.isdigit() and int(user) > 0 and f"--uid {user}" in only(recipe, "RUN")
    assert words.index("USER") > words.index("RUN")
    assert only(recipe, "STOPSIGNAL") == "SIGTERM"
    entry = json.loads(only(recipe, "ENTRYPOINT"))  # a shell between would keep the signal
    assert entry[0] == "enginehouse-launch" and json.loads(only(recipe, "CMD")) == ["/engine"]
    config = Path(entry[entry.index("--config") + 1])
    assert (ROOT / config.relative_to("/opt/enginehouse")).is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arguments_of_the_entry_are_ones_it_takes(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    entry = json.loads(only(recipe, "ENTRYPOINT"))
    config = str(ROOT / "configs" / "gunicorn.conf.py")
    arguments = [config if word.endswith("gunicorn.conf.py") else word for word in entry[1:]]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err, "it went as far as the engine"


def asked_beside_a_proxy(code: str) -> str:
    """The path a server is asked for while http_proxy, which docker passes on, leads nowhere."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        subprocess.run(
            [sys.executable, "-c", code.replace("8000", str(server.server_port))],
            env={**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
            check=True,
            timeout=30,
        )
        server.shutdown()
        thread.join()
    return asked[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_health_is_readiness(recipe: str) -> None:
    options, _, command = only(recipe, "HEALTHCHECK").partition(" CMD ")
    code = json.loads(command)[-1]
    compile(code, recipe, "exec")
    assert "/health/ready" in code and "--start-period=" in options
    assert asked_beside_a_proxy(code) == "/health/ready"
    assert '"/health/ready"' in (ROOT / "server" / "app.py").read_text(encoding="utf-8")


def test_the_base_image_is_the_release_that_compiles_engines() -> None:
    from enginehouse.build.tensorrt_llm.builder import TENSORRT_LLM

    assert only("Dockerfile", "FROM") == f"nvcr.io/nvidia/tensorrt-llm/release:{TENSORRT_LLM}"
    assert re.fullmatch(r"python:3\.1\d-slim", only("Dockerfile.cpu", "FROM"))


def test_compose_gives_the_gpu_server_what_it_needs() -> None:
    server = COMPOSE["services"]["server"]
    [device] = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert server["ipc"] == "host"
    assert server["ulimits"] == {"memlock": -1, "stack": 67108864}


def test_compose_waits_as_long_as_gunicorn_lets_answers_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_RUN_DIR", "/nowhere")  # it makes a folder otherwise
    settings = runpy.run_path(str(ROOT / "configs" / "gunicorn.conf.py"))
    for name, service in COMPOSE["services"].items():
        minutes = int(service["stop_grace_period"].removesuffix("m"))
        assert minutes * 60 > settings["graceful_timeout"], name
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        [volume] = service["volumes"]
        assert isinstance(volume, dict), "engines/mine:/engine would name a volume, no folder"
        assert (volume["type"], volume["target"]) == ("bind", "/engine")
        assert volume["read_only"] and volume["source"].startswith("${ENGINE:?")
        assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"], "not open to the network"
