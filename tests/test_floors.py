"""The ground floor carries the others: build and server import runtime, and never each other.

What judges engines, scripts/regress/, stands above all three; the front door, scripts/verbs/, above
all, and nothing imports it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from makers.paths import ROOT

FLOORS = {
    "build": {"build", "runtime"},
    "runtime": {"runtime"},
    "server": {"server", "runtime"},
    "regress": {"regress", "build", "runtime", "server"},
    "verbs": {"verbs", "regress", "build", "runtime", "server"},
}
FOLDERS = {name: ROOT / "scripts" / name for name in ("regress", "verbs")}  # others: as their floor
HEAVY = {"torch", "transformers", "numpy", "safetensors", "gguf"}
MODULES = {
    ".".join(("enginehouse", floor, *path.relative_to(folder).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for floor, folder in ((floor, FOLDERS.get(floor, ROOT / floor)) for floor in FLOORS)
    for path in folder.rglob("*.py")
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


def test_what_talks_to_a_server_from_outside_needs_python_alone() -> None:
    for name in (name for name in MODULES if name.startswith("enginehouse.server.client")):
        tops = {imported.partition(".")[0] for imported in imports_of(MODULES[name])}
        assert tops <= {*sys.stdlib_module_names, "enginehouse"}, f"{name} imports {tops}"


def test_a_worker_can_reach_no_file_that_imports_a_tensor_library() -> None:
    server = {name for name in MODULES if name.startswith("enginehouse.server")}
    reached = reached_from(server)
    assert "enginehouse.runtime.host.client" in reached, (
        "the late import of the client was not followed"
    )
    for name in reached:
        heavy = HEAVY & {imported.split(".")[0] for imported in imports_of(MODULES[name])}
        assert not heavy, f"{name} imports {heavy}, and a server worker can reach it"


def test_no_time_is_counted_by_the_wall_clock() -> None:
    """It can be set. An answer's stamp and the server's start are told, and nothing is done by
    them.
    """
    stamps = {"server.answer.completion", "server.http.metrics", "server.launch.gunicorn_hooks"}
    # What is kept for days outlives the machine's other clocks.
    stamps |= {f"server.api.responses.{name}" for name in ("routes", "conversations", "kept_items")}
    stamps |= {f"server.api.batches.{name}" for name in ("routes", "runner")}
    users = set()
    for name, path in MODULES.items():
        if name.split(".")[1] in ("runtime", "server"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time":
                    users.add(name)
    assert users == {f"enginehouse.{name}" for name in stamps}


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


# The house, from the ground up. A line is a room: a wing, or a file that lies loose at its floor's
# top. It may import the rooms named behind it, which stand above it here: so nothing runs in a
# circle. What is not drawn: the ground words, which all may import.
_WORDS = ("config", "config_parts", "engine", "errors", "executor", "request")
GROUND_WORDS = {f"runtime/{word}" for word in _WORDS}
HOUSE = """
runtime/machine
runtime/template
runtime/checkpoint
runtime/logprobs       machine
runtime/grammar
runtime/schemas        grammar
runtime/batching       machine logprobs grammar
runtime/torch          machine logprobs checkpoint batching
runtime/cpu            machine checkpoint batching
runtime/tensorrt       machine checkpoint batching
runtime/tensorrt_llm   machine logprobs grammar
runtime/backends       torch cpu tensorrt tensorrt_llm
runtime/host           machine backends

build/progress
build/forms            runtime/checkpoint runtime/tensorrt
build/source           forms
build/families         forms source
build/hf_keys          families  runtime/checkpoint
build/sources          forms source families hf_keys  runtime/checkpoint runtime/template
build/dequantize       forms source sources  runtime/checkpoint
build/gguf             source sources hf_keys
build/resolve          progress source sources families hf_keys dequantize gguf
build/check            forms source sources hf_keys
build/quantize         forms source families  runtime/checkpoint runtime/torch
build/plan             forms source families hf_keys quantize  runtime/checkpoint runtime/tensorrt runtime/cpu
build/report           progress source plan quantize
build/convert          progress forms source families sources quantize plan  runtime/checkpoint
build/tensorrt         progress forms families plan  runtime/machine runtime/checkpoint runtime/tensorrt
build/original         source
build/verify           runtime/checkpoint runtime/torch runtime/cpu
build/tensorrt_llm     progress forms source sources plan convert verify  runtime/machine runtime/torch runtime/backends
build/backends         progress forms source sources quantize plan convert tensorrt original verify tensorrt_llm report  runtime/cpu
build/stages           progress source sources plan convert original backends report
build/machine_facts    tensorrt_llm  runtime/machine runtime/cpu
build/doctor           machine_facts tensorrt_llm  runtime/machine runtime/grammar
build/cli              progress resolve plan convert tensorrt_llm backends stages doctor report
build/command          cli

server/text            runtime/grammar
server/tools           text  runtime/grammar runtime/schemas
server/formats         text tools  runtime/grammar
server/wire
server/prompt          text tools formats wire  runtime/template
server/request         text tools wire prompt  runtime/grammar runtime/schemas
server/answer          text tools formats prompt
server/observe         wire answer
server/api_keys
server/replicas        runtime/host
server/settings        text formats api_keys replicas
server/http            tools wire prompt request answer observe api_keys settings
server/api/chat        wire request prompt tools text answer http
server/api/texts       wire request prompt tools text answer observe http api/chat
server/api/embeddings  wire request prompt answer observe http api/texts
server/api/responses   wire request prompt tools text answer http api/chat
server/api/messages    wire request prompt tools text answer http api/chat
server/api/batches     wire request http api/responses
server/openapi         wire api/embeddings api/responses api/messages api/batches
server/page            wire http
server/app             wire prompt answer observe settings http replicas openapi page api/chat api/texts api/embeddings api/responses api/messages api/batches  runtime/host
server/nodes           runtime/machine
server/launch          wire replicas app nodes api/batches  runtime/machine runtime/host
server/ray_serve       replicas  runtime/host
server/deploy          launch nodes
server/client          runtime/machine

regress/findings
regress/outcome        findings
regress/explain
regress/limits
regress/suite
regress/subject        runtime/machine server/client
regress/numerics       build/source build/hf_keys build/quantize build/resolve
regress/speed          limits subject suite  server/client
regress/behaviour      findings subject  server/client
regress/recording      limits subject behaviour speed
regress/judge          findings outcome explain limits suite subject numerics speed recording
regress/report         findings outcome  build/report
regress/collect        subject suite numerics behaviour recording  server/client
regress/run            findings outcome explain limits suite subject numerics speed behaviour recording judge collect  server/client

verbs/base
verbs/main             base
verbs/build            base  build/plan build/cli build/command
verbs/plan             build
verbs/doctor           base  build/doctor
verbs/families         base  build/hf_keys
verbs/check            base  build/check
verbs/compile          base  build/cli build/command
verbs/serve            base  runtime/machine server/settings server/launch
verbs/deploy           base  server/deploy
verbs/chat             base  server/client
verbs/bench            base  server/client
verbs/run_batch        base  server/api/batches server/client
verbs/top              base  server/observe server/client
verbs/regress          base  regress/explain regress/limits regress/suite regress/recording regress/report regress/run
"""  # noqa: E501  a room's arrows stand on its line
MOST_FILES, MOST_LOOSE = 14, 9
MOST_VERBS = 18  # a file each, and nothing else
STREETS = {"server/api"}  # of wings that do the same job, a folder each


def room_of(name: str) -> str:
    """`runtime/grammar` of a module in that wing, `runtime/errors` of a file that lies loose."""
    floor, *rest = name.split(".")[1:]
    is_in_street = f"{floor}/{''.join(rest[:1])}" in STREETS
    return "/".join((floor, *rest[: 2 if is_in_street else 1]))


def drawn() -> dict[str, set[str]]:
    """HOUSE as it reads: each room, from the ground up, and the rooms that it may import."""
    rooms: dict[str, set[str]] = {}
    for room, *names in map(str.split, filter(None, HOUSE.splitlines())):
        floor = room.split("/")[0]
        is_whole = [name for name in names if "/" in name and name.split("/")[0] in FLOORS]
        rooms[room] = {name if name in is_whole else f"{floor}/{name}" for name in names}
    return rooms


def arrows() -> dict[str, set[str]]:
    """Each room of the tree, and the rooms that its files import, late imports included."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name.count(".") == 1:  # a floor's own __init__
            continue
        targets = {room_of(imported) for imported in imports_of(path) if imported in MODULES}
        found.setdefault(room_of(name), set()).update(targets - {room_of(name)})
    return found


def test_the_arrows_between_rooms_are_those_of_the_drawing() -> None:
    found = arrows()
    words = {room: found.pop(room) for room in GROUND_WORDS}
    assert set().union(*words.values()) <= GROUND_WORDS, words
    floors = set(FLOORS)
    assert {room: names - GROUND_WORDS - floors for room, names in found.items()} == drawn()


def test_no_room_imports_what_stands_on_it() -> None:
    below: set[str] = set()
    for room, names in drawn().items():
        assert names <= below, f"{room} imports {names - below}, drawn above it"
        below.add(room)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_wing_has_few_files_and_a_floor_few_loose_ones(floor: str) -> None:
    def files(folder: Path) -> set[str]:
        return {path.name for path in folder.glob("*.py")} - {"__init__.py"}

    top = FOLDERS.get(floor, ROOT / floor)
    assert len(files(top)) <= (MOST_VERBS if floor == "verbs" else MOST_LOOSE)
    wings = {path.parent for path in top.rglob("*.py")} - {top}
    for wing in wings:
        street = top / wing.relative_to(top).parts[0]
        is_in_street = f"{floor}/{street.name}" in STREETS
        assert wing.parent == (street if is_in_street else top), f"{wing} is deeper than one"
        assert 3 <= len(files(wing)) <= MOST_FILES, f"{wing} has {len(files(wing))} files"


def test_what_a_wing_keeps_to_itself_is_not_imported_elsewhere() -> None:
    for name, path in MODULES.items():
        modules: dict[str, str] = {}  # what a module of another room is called in this file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    if module in MODULES and room_of(module) != room_of(name):
                        modules[alias.asname or alias.name] = module
                    elif node.module in MODULES and room_of(node.module) != room_of(name):
                        assert not alias.name.startswith("_"), f"{name} imports {module}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules and node.attr.startswith("_"):
                    raise AssertionError(f"{name} uses {modules[node.value.id]}.{node.attr}")


FACES = [path for name, path in MODULES.items() if path.name == "__init__.py" and "." in name[12:]]


@pytest.mark.parametrize("path", FACES, ids=lambda path: path.parent.name)
def test_a_wings_face_is_its_docstring(path: Path) -> None:
    """3 to 8 lines: what becomes what, what it imports, what it does not know, what to read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1 and 3 <= len(text.splitlines()) <= 8
    assert "Imports " in text and "oes not " in text
    first = re.search(r"Read\s+`(\w+\.py)`\s+first", text)
    assert first and (path.parent / first[1]).is_file()


@pytest.mark.parametrize("path", FACES, ids=lambda path: path.parent.name)
def test_a_face_names_the_wings_of_its_floor_that_it_imports(path: Path) -> None:
    wing = "/".join(path.parent.relative_to(ROOT).parts)
    floor = wing.split("/")[0]
    if floor == "scripts":  # the front door imports every floor, and says so
        return
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    [said] = re.findall(r"Imports (.*?) Does not ", text)
    wings = {name for name in drawn()[wing] if name.startswith(f"{floor}/")}
    wings = {name.split("/")[-1] for name in wings if (ROOT / name).is_dir()}
    assert set(re.findall(r"`(\w+)/`", said)) == wings
