"""`serve`: flags become the server's variables; and the whole of it, with a chat and a bench."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from enginehouse.server.launch.launcher import APP, CONFIG
from enginehouse.verbs.main import main
from makers.engines import EngineMaker, build_endless_engine
from makers.gunicorn_server import DEADLINE_S, Server, wait_until
from makers.paths import ROOT

FRONT_DOOR = [sys.executable, "-m", "enginehouse.verbs.main"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ENGINEHOUSE_", "SLURM_", "PMI", "OMPI_", "PRTE_")):
            monkeypatch.delenv(name)


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the command that a dry run prints."""
    assert main(["serve", *words, "--dry-run"]) == 0, capsys.readouterr().err
    return shlex.split(capsys.readouterr().out)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        assert main(["serve", *words]) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert error.startswith("enginehouse serve: ") and error.count("\n") == 1
    return error


FLAGS = {
    "--host 0.0.0.0 --port 9": "BIND=0.0.0.0:9",
    "--port 9": "BIND=127.0.0.1:9",
    "--host ::1": "BIND=[::1]:8000",
    "--workers 2": "WORKERS=2",
    "--name mine": "MODEL_NAME=mine",
    "--cors-origins https://a.example": "CORS_ORIGINS=https://a.example",
    "--deterministic": "DETERMINISTIC=1",
    "--max-seq-len 1000": "MAX_SEQ_LEN=1000",
    "--max-batch-size 3": "MAX_BATCH_SIZE=3",
    "--max-num-tokens 32": "MAX_NUM_TOKENS=32",
    "--prefill-ms 12.5": "PREFILL_MS=12.5",
    "--kv-cache-gib 0.5": "KV_CACHE_GIB=0.5",
    "--log-level warning": "LOG_LEVEL=warning",
    "--log-format json": "LOG_FORMAT=json",
    "--access-log 1": "ACCESS_LOG=1",
    "--access-log 0": "ACCESS_LOG=0",
    "--speculative off": "SPECULATIVE=off",
    "--device cpu": "DEVICE=cpu",
    "--tp-size 2": "TP_SIZE=2",
    "--start-s 90": "START_S=90",
    "--tool-format hermes": "TOOL_FORMAT=hermes",
    "--reasoning-format think": "REASONING_FORMAT=think",
    "--price-input 0.1": "PRICE_INPUT=0.1",
    "--price-output 0.2": "PRICE_OUTPUT=0.2",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_sets_its_variable_and_overrides_the_environment(
    flags: str,
    make_engine: EngineMaker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = make_engine()
    variable = f"ENGINEHOUSE_{FLAGS[flags]}"
    settings = sorted([f"ENGINEHOUSE_ENGINE={engine}", variable])
    gunicorn = ["-c", CONFIG, APP]
    for before in (None, "1"):
        if before is not None and before != variable.partition("=")[2]:
            monkeypatch.setenv(variable.partition("=")[0], before)
        words = said([str(engine), *flags.split()], capsys)
        assert words[:3] == ["env", *settings] and words[4:] == gunicorn
        assert Path(words[3]).name == "gunicorn"


def test_what_is_not_given_is_the_environments(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = str(make_engine())
    monkeypatch.setenv("ENGINEHOUSE_ENGINE", engine)
    monkeypatch.setenv("ENGINEHOUSE_BIND", "0.0.0.0:7777")
    monkeypatch.setenv("ENGINEHOUSE_WORKERS", "3")
    assert said([], capsys)[1:] == ["-c", CONFIG, APP], "all of it is in the environment"
    assert said(["--port", "9"], capsys)[1] == "ENGINEHOUSE_BIND=0.0.0.0:9"
    assert said(["--host", "127.0.0.1"], capsys)[1] == "ENGINEHOUSE_BIND=127.0.0.1:7777"


def test_keys_are_read_from_the_file_before_anything_starts(
    make_engine: EngineMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    words = [str(make_engine()), "--api-keys-file", str(keys)]
    assert f"{str(keys)!r} cannot be read" in refusal(words, capsys)
    keys.write_text("secret\n", encoding="utf-8")
    assert f"ENGINEHOUSE_API_KEYS_FILE={keys}" in said(words, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port x", "x is out of range; wanted 1 to 65535"),
        ("--port 0", "0 is out of range"),
        ("--workers none", "none is out of range; wanted 1 to 1024"),
        ("--device gpu", "invalid choice: 'gpu'"),
        ("--tool-format nope", "ENGINEHOUSE_TOOL_FORMAT='nope' is not known; choose one of auto"),
        ("--kv-cache-gib 4GiB", "ENGINEHOUSE_KV_CACHE_GIB='4GiB'; wanted GiB, like 4 or 0.5"),
        ("--prefill-ms 0", "ENGINEHOUSE_PREFILL_MS='0'; wanted milliseconds, like 20"),
        ("--speculative eagle", "invalid choice: 'eagle'"),
        ("--log-level loud", "ENGINEHOUSE_LOG_LEVEL='loud'; wanted debug, info, warning, error"),
        ("--max-seq-len 0", "0 is out of range"),
        ("--price-input much", "ENGINEHOUSE_PRICE_INPUT='much'"),
        ("--host no.such.host.invalid", "no.such.host.invalid:8000 cannot be listened on"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: str, message: str, make_engine: EngineMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal([str(make_engine()), *flags.split()], capsys)


def test_an_engine_must_be_given_and_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal([], capsys)
    assert "no engine is given" in error and "`make serve`" in error
    assert "none is not a directory" in refusal([str(tmp_path / "none")], capsys)


def test_a_port_that_is_taken_is_refused_at_once(
    make_engine: EngineMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refusal([str(make_engine()), "--port", port], capsys)
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in error
    assert f", process {os.getpid()}); choose" in error and "PORT= of make serve" in error


def test_make_serve_becomes_the_verb() -> None:
    command = ["make", "-n", "serve", "ENGINE=engines/mine", "PORT=9000"]
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "exec .venv/bin/enginehouse serve engines/mine --host 127.0.0.1 --port 9000"
    )


class FrontDoor(Server):
    """`enginehouse serve`, told in flags what the environment says otherwise."""

    def command(self, engine: Path) -> list[str | Path]:
        return [*FRONT_DOOR, "serve", engine, "--port", str(self.port), "--name", "mine"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_endless_engine(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINEHOUSE_MODEL_NAME", "another")
        running = FrontDoor(engine, log)
    family = psutil.Process(running.process.pid).children(recursive=True)
    yield running
    assert running.stop() == 0, "SIGTERM ends it as it ends gunicorn"
    _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
    assert alive == []
    assert f"enginehouse is ready: {running.url}" in log.read_text()


def chat(target: str | Path, lines: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FRONT_DOOR, "chat", target, "--temperature", "0", *flags],
        input=lines,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def binds_of(engine: Path) -> set[str | None]:
    """Where this engine is served: what gunicorn's processes and the hosts were told."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environ = process.environ()
            if environ.get("ENGINEHOUSE_ENGINE") == str(engine):
                found.add(environ.get("ENGINEHOUSE_BIND"))
    return found


def test_a_chat_over_a_pipe_is_answered_by_the_engine(server: Server, engine: Path) -> None:
    """With a server that is given, and with one that the chat starts and ends."""
    done = chat(server.url, "What is the time?\n/reset\nWhat is the time?\n", "--max-tokens", "9")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout and done.stdout == 2 * done.stdout[: len(done.stdout) // 2]
    own = chat(engine, "What is the time?\n", "--max-tokens", "9")
    assert own.returncode == 0, own.stderr
    assert 2 * own.stdout == done.stdout
    assert binds_of(engine) == {f"127.0.0.1:{server.port}"}


def test_ctrl_c_stops_an_answer_and_the_server_cancels_it(server: Server) -> None:
    process = subprocess.Popen(
        [*FRONT_DOOR, "chat", server.url, "--temperature", "0", "--max-tokens", "8000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"What is the time?\n")
    process.stdin.flush()
    assert process.stdout.read(1), "the answer has begun"
    wait_until(lambda: server.metric("enginehouse_num_requests_running") == 1, "it is running")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: server.metric("enginehouse_num_requests_running") == 0, "it was cancelled")
    out, error = process.communicate(b"/exit\n", timeout=DEADLINE_S)
    assert (process.returncode, error) == (0, b""), "the chat went on until it was left"
    assert out.endswith(b"\n")


def test_a_bench_of_a_real_server_passes(server: Server) -> None:
    done = subprocess.run(
        [*FRONT_DOOR, "bench", server.url, "--clients", "1", "4", "--tokens", "8", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{server.url}: mine, up to 8 tokens each; end of sequence ignored"
    assert [line.split()[0] for line in lines[2:4]] == ["1", "4"]
    assert lines[4] == "every stream was well formed, and none had another's id or text"


def test_gunicorns_configuration_is_a_module_that_can_be_read_again(
    server: Server, engine: Path
) -> None:
    master = psutil.Process(server.process.pid)
    workers = [child for child in master.children() if child.pid != server.host_pid()]
    master.send_signal(signal.SIGHUP)
    gone, _ = psutil.wait_procs(workers, timeout=DEADLINE_S)
    assert gone == workers, "the old worker ended"
    wait_until(server.is_ready, "a new one is ready")
