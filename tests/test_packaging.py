"""What is installed is what the folders hold: packages, data, scripts, and pinned versions."""

from __future__ import annotations

import configparser
import importlib
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from enginehouse.runtime.grammar.support import OLDEST
from makers.paths import ROOT
from makers.wheel import FLOORS, build_wheel

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def lines_of(section: str, option: str) -> list[str]:
    return [line.strip() for line in SETUP[section][option].splitlines() if line.strip()]


def requirements() -> list[Requirement]:
    extras = [
        line
        for extra in SETUP["options.extras_require"]
        if extra != "trtllm"  # never installed together with the lock
        for line in lines_of("options.extras_require", extra)
    ]
    return [Requirement(line) for line in lines_of("options", "install_requires") + extras]


def pins() -> dict[str, list[str]]:
    """The versions that constraints.txt allows, by name: one, or one for each marker."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = re.split(r"(?:^|\s)#", line)[0].strip()
        if not text or text.startswith("-"):
            continue
        wanted = Requirement(text)
        specifiers = list(wanted.specifier)
        assert [s.operator for s in specifiers] == ["=="], f"{text}: wanted name==version"
        found.setdefault(canonicalize_name(wanted.name), []).append(specifiers[0].version)
    return found


def test_setup_cfg_names_every_package() -> None:
    packages = {
        ".".join(("enginehouse", floor, *path.parent.relative_to(folder).parts)): path.parent
        for floor, folder in FLOORS.items()
        for path in folder.rglob("__init__.py")
    }
    assert set(lines_of("options", "packages")) == set(packages)
    for line in lines_of("options", "package_dir"):
        name, _, folder = (part.strip() for part in line.partition("="))
        assert packages[name] == ROOT / folder


def test_every_module_lies_in_a_package() -> None:
    for folder in FLOORS.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path} would not be in the wheel"


def test_every_data_file_is_there() -> None:
    packages = lines_of("options", "packages")
    for package, names in SETUP["options.package_data"].items():
        for name in packages if package == "*" else [package]:
            for file in names.split():
                _, floor, *wings = name.split(".")
                folder = FLOORS[floor].joinpath(*wings)
                assert (folder / file).is_file(), f"{name} has no {file}"


def test_every_file_beside_the_code_is_data_that_setup_cfg_names() -> None:
    data = SETUP["options.package_data"].values()
    named = {Path(file).name for names in data for file in names.split()}
    for folder in FLOORS.values():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert path.name in named, f"{path} would not be in the wheel"


@pytest.mark.parametrize("line", lines_of("options.entry_points", "console_scripts"))
def test_a_console_script_leads_to_a_function(line: str) -> None:
    _, _, target = (part.strip() for part in line.partition("="))
    module, _, function = target.partition(":")
    if "tensorrt" in module:
        pytest.importorskip("torch", reason="a rank computes in torch, which is not installed")
    assert callable(getattr(importlib.import_module(module), function))


def test_constraints_pin_a_fitting_version_of_every_requirement() -> None:
    pinned = pins()
    for wanted in requirements():
        versions = pinned.get(canonicalize_name(wanted.name))
        assert versions, f"constraints.txt pins no version of {wanted.name}"
        for version in versions:
            assert wanted.specifier.contains(version, prereleases=True), (
                f"constraints.txt pins {wanted.name}=={version}; setup.cfg wants {wanted}"
            )


@pytest.mark.parametrize("python", ["3.10", "3.12"])
def test_the_lower_bounds_leave_room_for_tensorrt_llm(python: str) -> None:
    """What tensorrt-llm 1.2.1 pins must be allowed by every bound of the product on the same
    package. The tests have an environment of their own: they compare with transformers 5.
    """
    pinned = [
        Requirement(line)
        for line in lines_of("options.extras_require", "trtllm")
        if Requirement(line).marker.evaluate({"python_version": python})  # type: ignore[union-attr]
    ]
    assert len(pinned) == 4, "the extra names what 1.2.1 pins, on each of its Pythons"
    versions = {"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48", "torch": "2.9.1"}
    own = [Requirement(line) for line in lines_of("options", "install_requires")]
    for wanted in [*pinned, *own]:
        version = {**versions, "transformers": "4.57.3"}.get(wanted.name)
        if version is not None:
            assert wanted.specifier.contains(version, prereleases=True), wanted


def test_the_extra_for_tensorrt_llm_is_empty_on_a_python_without_wheels() -> None:
    for line in lines_of("options.extras_require", "trtllm"):
        marker = Requirement(line).marker
        assert marker is not None and not marker.evaluate({"python_version": "3.11"})


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_floors_and_the_front_door(wheel_names: set[str]) -> None:
    wanted = {
        f"enginehouse/{floor}/{path.relative_to(folder).as_posix()}"
        for floor, folder in FLOORS.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {f"enginehouse/{floor}/py.typed" for floor in FLOORS} <= wanted
    assert "enginehouse/build/quantize/calibration.txt" in wanted
    assert {name for name in wheel_names if name.startswith("enginehouse/")} == wanted


def test_the_wheel_puts_nothing_beside_enginehouse(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"enginehouse"}


@pytest.mark.parametrize(("version", "tested"), [("3.12", True), ("3.14", False)])
def test_the_oldest_xgrammar_is_tested_where_it_has_wheels(
    version: str, tested: bool, tmp_path: Path
) -> None:
    """With a program in Python's place that says its version and what it is asked for."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit\n'
        f'echo "$PYTHONPATH $*" >> {tmp_path}/asked\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "test_xgrammar.sh", python], capture_output=True, text=True, check=True
    )
    if not tested:
        assert done.stdout.startswith("xgrammar 0.1.25 has wheels for Python 3.10 to 3.13, and ")
        assert "this is 3.14" in done.stdout and not (tmp_path / "asked").exists()
        return
    lines = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    folder = str(ROOT / ".cache" / f"xgrammar-{OLDEST}-python{version}")
    assert lines[0].endswith(f"--target {folder} xgrammar=={OLDEST}") or Path(folder).is_dir()
    assert lines[-1].startswith(f"{folder} -m pytest")
    files = [word for word in lines[-1].split() if word.endswith(".py")]
    assert "tests/runtime/grammar/test_constraint.py" in files
    assert all((ROOT / name).is_file() for name in files)
