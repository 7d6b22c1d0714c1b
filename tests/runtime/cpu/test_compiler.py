"""The library that is compiled once, and what is said when it cannot be."""

from __future__ import annotations

import shutil
import stat
import sys
from pathlib import Path

import pytest

from enginehouse.runtime.cpu import compiler, instructions
from enginehouse.runtime.cpu.compiler import SOURCE, cache_folder, compiled_library, find_compiler
from enginehouse.runtime.cpu.instructions import available, choose_instructions
from enginehouse.runtime.errors import EngineError

AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"}

# Stands for a compiler: tells its version, else writes its last argument and counts its calls.
STAND_IN = """#!/bin/sh
if [ "$*" = --version ]; then echo "stand-in 1"; exit; fi
echo once >> "$CALLS"
for last; do :; done
echo library > "$last"
"""
FAILING = """#!/bin/sh
if [ "$1" = --version ]; then echo "stand-in 1"; exit; fi
echo "In file included from engine.cpp:2:" >&2
echo "vectors.h:9:1: error: this compiler knows no vectors" >&2
exit 1
"""


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_CACHE", str(tmp_path / "cache"))


def test_the_same_source_is_compiled_once_and_a_changed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", STAND_IN))
    first = compiled_library("plain")
    assert compiled_library("plain") == first and first.read_text() == "library\n"
    assert compiled_library("avx2") != first
    assert calls.read_text().count("once") == 2 * 2  # compiled and linked

    changed = tmp_path / "native"
    shutil.copytree(SOURCE, changed)
    (changed / "pool.h").write_text("// another\n")
    monkeypatch.setattr(compiler, "SOURCE", changed)
    assert compiled_library("plain") != first
    assert [path.suffix for path in cache_folder("native").iterdir()] == [".so"] * 3


def test_a_compiler_that_fails_is_told_with_its_first_error_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", FAILING))
    with pytest.raises(EngineError, match="vectors.h:9:1: error: this compiler knows") as caught:
        compiled_library("plain")
    log = Path(str(caught.value).rpartition(" ")[2])
    assert log.read_text().startswith("In file included")
    assert list(cache_folder("native").iterdir()) == [log]


def test_no_compiler_is_told_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"install g\+\+ or clang\+\+, or `pip install 'engi"):
        find_compiler()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ziglang" or None)
    assert find_compiler() == [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline"]


def test_cxx_comes_first_then_gcc_then_clang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    clang = program(tmp_path / "clang++", STAND_IN)
    assert find_compiler() == [clang]
    gcc = program(tmp_path / "g++", STAND_IN)
    assert find_compiler() == [gcc]
    monkeypatch.setenv("CXX", "clang++ -O1")
    assert find_compiler() == [clang, "-O1"]


def test_a_cxx_that_is_no_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(EngineError, match="CXX=no-such-compiler is no program on PATH"):
        find_compiler()


@pytest.mark.parametrize(
    ("words", "best"),
    [
        (AVX512 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}, "avx512_amx"),
        (AVX512 | {"avx512_bf16", "avx512_vnni", "amx_tile"}, "avx512_bf16"),
        (AVX512 | {"avx512_vnni"}, "avx512_vnni"),
        (AVX512, "avx512"),
        (AVX512 - {"avx512dq"}, "avx2"),
        ({"avx2", "fma", "avx_vnni"}, "avx2_vnni"),
        ({"avx2"}, "plain"),
        ({"asimd", "asimddp", "bf16", "i8mm"}, "neon_bf16"),
        ({"asimd", "asimddp", "i8mm"}, "neon_dotprod"),
        ({"asimd"}, "plain"),
        (set(), "plain"),
    ],
)
def test_the_best_set_is_one_that_the_cpu_has_whole(words: set[str], best: str) -> None:
    assert available(words)[0] == best and available(words)[-1] == "plain"


@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_that_the_kernel_refuses_are_not_there(
    monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setattr(instructions.Path, "read_text", lambda *_, **__: "avx2 amx_tile amx_bf16")
    monkeypatch.setattr(instructions.Path, "exists", lambda _: True)
    monkeypatch.setattr(instructions, "_tiles_are_allowed", lambda: allowed)
    assert instructions.cpu_words() == {"avx2"} | ({"amx_tile", "amx_bf16"} if allowed else set())


def test_a_set_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "cpu_words", lambda: {"avx2", "fma"})
    monkeypatch.setenv("ENGINEHOUSE_CPU_INSTRUCTIONS", "plain")
    assert choose_instructions() == "plain"
    monkeypatch.setenv("ENGINEHOUSE_CPU_INSTRUCTIONS", "avx512")
    with pytest.raises(EngineError, match="wanted one that this CPU has: avx2, plain"):
        choose_instructions()
