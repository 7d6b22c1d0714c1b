"""The ground floor carries the others: build and server import runtime, and never each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from makers.paths import ROOT

FLOORS = {"build": {"build", "runtime"}, "runtime": {"runtime"}, "server": {"server", "runtime"}}
HEAVY = {"torch", "transformers", "numpy", "safetensors", "gguf"}
MODULES = {
    ".".join(("enginehouse", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for floor in FLOORS
    for path in (ROOT / floor).rglob("*.py")
}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file that stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached_from(start: set[str]) -> set[str]:
    """The modules of enginehouse that importing `start` can lead to, late imports included."""
    reached: set[str] = set()
    waiting = set(start)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= (set(imports_of(MODULES[name])) & MODULES.keys()) - reached
    return reached


@pytest.mark.parametrize("name", MODULES)
def test_a_floor_imports_itself_and_the_ground_floor_only(name: str) -> None:
    allowed = FLOORS[name.split(".")[1]]
    for imported in imports_of(MODULES[name]):
        first, _, rest = imported.partition(".")
        assert first not in FLOORS, f"{name} imports {imported}; write enginehouse.{imported}"
        if first == "enginehouse" and rest:
            assert rest.split(".")[0] in allowed, f"{name} imports {imported}"


def test_a_worker_can_reach_no_file_that_imports_a_tensor_library() -> None:
    server = {name for name in MODULES if name.startswith("enginehouse.server")}
    reached = reached_from(server)
    assert "enginehouse.runtime.host.client" in reached, (
        "the late import of the client was not followed"
    )
    for name in reached:
        heavy = HEAVY & {imported.split(".")[0] for imported in imports_of(MODULES[name])}
        assert not heavy, f"{name} imports {heavy}, and a server worker can reach it"


def test_a_fresh_worker_has_loaded_no_tensor_library() -> None:
    code = (
        "import sys, enginehouse.server.app, enginehouse.runtime.host.client\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert (result.returncode, result.stdout.split()) == (0, []), result.stdout + result.stderr
