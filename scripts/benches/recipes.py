"""Who takes part, and how each is started: ours by arithmetic and backend, and the peers.

A peer whose environment cannot be made is named and left out. Threads: as many as there are cores,
for everyone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benches import peers
from benches.contender import HERE, Recipe
from enginehouse.server.client.own_server import free_port

_CACHE_GIB = 1
_NICE = 5
_PROCESSES = {"engine": "enginehouse-host", "workers": "gunicorn"}
_LLAMA_SEQUENCES, _LLAMA_TOKENS = 32, 16384


def in_process(engine: Path, arithmetic: str) -> Recipe:
    """engine: packed for that arithmetic, which is its name here."""
    return Recipe(arithmetic, _child("run_ours.py", engine, "cpu"), _our_path())


def through_http(engine: Path, arithmetic: str) -> Recipe:
    port = free_port()
    command = ("-m", "enginehouse.verbs.main", "serve", str(engine), "--port", str(port))
    return Recipe(
        f"http {arithmetic}",
        (sys.executable, *command, "--log-level", "warning", "--speculative", "off"),
        _our_path(),
        port,
        "/health/ready",
        _child("run_load.py", port, "chat"),
    )


def variants(engine: Path, arithmetic: str) -> list[Recipe]:
    """The same server with less room for its engine: one thread, or a priority below the workers';
    and with less for its workers.
    """
    names = {"1 thread": ({"OMP_NUM_THREADS": "1"}, None)}
    names |= {f"{who} nice": ({}, (word, _NICE)) for who, word in _PROCESSES.items()}
    found = []
    for name, (env, nice) in names.items():
        recipe = through_http(engine, arithmetic)
        found.append(
            recipe._replace(name=f"{recipe.name}, {name}", env={**recipe.env, **env}, nice=nice)
        )
    return found


def torch_backend(engine: Path) -> Recipe:
    command = _child("run_ours.py", engine, "torch")
    return Recipe("torch", command, _our_path(), goals=False)


def peer_recipes(gguf: Path, folder: Path, wanted: list[str]) -> list[Recipe]:
    """Those that can be had, OpenVINO first."""
    makers: dict[str, Callable[[], Recipe]] = {
        "openvino": lambda: _openvino(gguf, folder),
        "llama.cpp": lambda: _llama(gguf, folder),
        "transformers": lambda: _transformers(gguf),
    }
    found = []
    for name in wanted:
        try:
            found.append(makers[name]())
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def _openvino(gguf: Path, folder: Path) -> Recipe:
    python = peers.python_of(peers.OPENVINO, folder)
    command = (str(python), str(HERE / "run_openvino.py"), str(gguf), str(_CACHE_GIB))
    return Recipe("openvino", command)


def _llama(gguf: Path, folder: Path) -> Recipe:
    program = peers.llama_server(peers.python_of(peers.LLAMA, folder))
    port, cores = free_port(), str(os.cpu_count())
    command = [str(program), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(_LLAMA_SEQUENCES), "-c", str(_LLAMA_TOKENS), "--kv-unified"]
    command += ["-t", cores, "-tb", cores]
    load = _child("run_load.py", port, "llama")
    return Recipe("llama.cpp", tuple(command), {}, port, "/health", load, goals=False)


def _transformers(gguf: Path) -> Recipe:
    """In our own environment, which has it where tests run: of the same torch."""
    if find_spec("transformers") is None:
        raise ValueError("transformers is not installed here; `make install` has it")
    return Recipe("transformers", _child("run_transformers.py", gguf), {}, goals=False)


def _child(file: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / file), *map(str, arguments))


def _our_path() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": path} if path else {}
