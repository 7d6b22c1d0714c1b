"""scripts/install.sh with programs in Python's place: which are refused, kept, and replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from makers.paths import ROOT

# A Python that only says its version, makes environments of itself, and notes what pip is asked.
FAKE = """#!/bin/sh
case "$1 $2" in
"-c "*) echo {version} ;;
"-m venv") rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/pyvenv.cfg" ;;
"-m pip") echo "$*" >> "{log}" ;;
esac
"""
TOOLS = ("bash", "cp", "dirname", "env", "grep", "make", "mkdir", "rm", "sed", "sh", "touch")


class Machine:
    """A PATH of its own: tools, and the Pythons that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.venv, self.log = folder / "bin", folder / "venv", folder / "pip"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)

    def add(self, name: str, version: str) -> None:
        program = self.bin / name
        program.write_text(FAKE.format(version=version, log=self.log), encoding="utf-8")
        program.chmod(0o755)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )

    def install(self, python: str = "any", *extras: str) -> subprocess.CompletedProcess[str]:
        return self.run("scripts/install.sh", str(self.venv), python, *extras)

    def installed(self) -> list[str]:
        """What pip was asked for since the last look, but for its version."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if "--version" not in line]

    def python(self) -> str:
        """The version of the environment's Python."""
        done = subprocess.run(
            [self.venv / "bin" / "python", "-c", ""], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


RANGE = "enginehouse takes Python 3.10 to 3.13"


@pytest.mark.parametrize("version", ["3.9", "3.14", "2.7"])
def test_a_python_that_does_not_fit_is_refused_before_anything_is_made(
    machine: Machine, version: str
) -> None:
    machine.add(f"python{version}", version)
    machine.add("python3.12", "3.12")
    done = machine.install(f"python{version}")
    assert (done.returncode, done.stdout) == (2, "")
    wanted = f"PYTHON=python{version} is Python {version}; {RANGE}: add PYTHON=python3.12\n"
    assert done.stderr == wanted
    assert not machine.venv.exists()


def test_python3_must_fit_where_none_is_named(machine: Machine) -> None:
    done = machine.install()
    assert done.stderr.startswith(f"python3 is not on PATH; {RANGE}, of which none is on PATH")
    machine.add("python3", "3.9")
    machine.add("python3.11", "3.11")
    done = machine.install()
    assert done.stderr == f"python3 is Python 3.9; {RANGE}: add PYTHON=python3.11\n"
    assert machine.install("python3.8").stderr.startswith("PYTHON=python3.8 is no Python that runs")
    assert not machine.venv.exists()


def test_make_says_it_too_and_takes_the_next_try(machine: Machine) -> None:
    machine.add("python3.9", "3.9")
    machine.add("python3.12", "3.12")
    words = ("make", "ready", f"VENV={machine.venv}")
    done = machine.run(*words, "PYTHON=python3.9")
    assert done.returncode == 2 and f"is Python 3.9; {RANGE}" in done.stderr
    assert machine.run(*words, "PYTHON=python3.12").returncode == 0
    assert machine.python() == "3.12"


def unfit(machine: Machine) -> None:
    machine.add("old", "3.9")
    machine.run(str(machine.bin / "old"), "-m", "venv", "--clear", str(machine.venv))


def without_pip(machine: Machine) -> None:
    machine.run(str(machine.bin / "python3"), "-m", "venv", "--clear", str(machine.venv))
    python = machine.venv / "bin" / "python"
    text = python.read_text(encoding="utf-8")
    python.write_text(text.replace('echo "$*"', 'exit 1; echo "$*"'), encoding="utf-8")


def without_python(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "pyvenv.cfg").touch()


@pytest.mark.parametrize("half_made", [unfit, without_pip, without_python])
def test_an_environment_that_does_not_do_is_made_anew(
    machine: Machine, half_made: Callable[[Machine], None]
) -> None:
    machine.add("python3", "3.12")
    half_made(machine)
    (machine.venv / "left").touch()
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert "and is made anew with Python 3.12" in done.stdout
    assert machine.python() == "3.12" and not (machine.venv / "left").exists()
    assert len(machine.installed()) == 1


def test_another_python_replaces_the_one_of_a_finished_environment_only_when_it_is_asked_for(
    machine: Machine,
) -> None:
    machine.add("python3", "3.11")
    machine.add("python3.12", "3.12")
    assert machine.install().returncode == 0
    machine.add("python3", "3.13")
    assert machine.install().stdout == "", "3.11 fits, and nobody asked for another"
    assert machine.python() == "3.11"
    assert "of Python 3.11, and is made anew" in machine.install("python3.12").stdout
    assert machine.python() == "3.12"
    assert machine.install("python3.12").stdout == ""


def test_what_is_no_environment_is_not_removed(machine: Machine) -> None:
    machine.add("python3", "3.12")
    machine.venv.mkdir()
    (machine.venv / "mine").touch()
    done = machine.install()
    assert done.returncode == 2 and "is no virtual environment: move it" in done.stderr
    assert (machine.venv / "mine").exists()


def test_tests_and_linters_are_installed_when_they_are_wanted(machine: Machine) -> None:
    machine.add("python3", "3.12")
    pip = "-m pip install -q -c constraints.txt -e ."
    done = machine.install()
    assert machine.installed() == [pip]
    first, last = done.stdout.splitlines()
    assert first.startswith(f"installing into {machine.venv} (") and last.startswith("installed in")
    machine.install()
    assert machine.installed() == [], "a finished one is left as it is"
    machine.install("any", "[test,lint]")
    assert machine.installed() == [f"{pip}[test,lint]"]
    machine.install()
    assert machine.installed() == []
    os.utime(machine.venv / "bin" / ".installed", (0, 0))
    machine.install()
    assert machine.installed() == [pip], "constraints.txt is newer"


@pytest.mark.parametrize(
    ("target", "extras"),
    [
        *((target, "") for target in ("engine", "plan", "doctor", "serve")),
        *((target, " '[test,lint]'") for target in ("install", "test", "lint", "build")),
    ],
)
def test_a_target_installs_no_more_than_it_needs(target: str, extras: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env.pop("PYTHON", None)
    for words, python in (([], "any"), (["PYTHON=python3.12"], "python3.12")):
        done = subprocess.run(
            ["make", "-n", target, "VENV=v", *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[0] == f"scripts/install.sh v {python}{extras}"
