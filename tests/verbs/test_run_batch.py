"""`enginehouse run-batch`: a file of requests by an engine, errors apart, gone on with when cut."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from enginehouse.verbs.main import main
from enginehouse.verbs.run_batch import make_parser
from makers.engines import QUICKEST, EngineMaker

CHAT = "/v1/chat/completions"


def lines(count: int, name: str, tokens: int = 2) -> str:
    asked = []
    for number in range(count):
        body = {"model": name, "prompt": f"number {number}", "max_tokens": tokens, "seed": number}
        body |= {"ignore_eos": True}
        line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions"}
        asked.append(json.dumps({**line, "body": body}))
    return "\n".join(asked) + "\n"


def test_a_file_is_answered_and_goes_on_after_a_kill(
    make_engine: EngineMaker, tmp_path: Path
) -> None:
    engine = make_engine(**QUICKEST)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(30, engine.name, tokens=24) + "no json\n")
    command = [sys.executable, "-m", "enginehouse.verbs.main", "run-batch", str(source)]
    command += ["-o", str(output), "--engine", str(engine)]
    env = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    with subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE) as run:
        journal = tmp_path / "out.jsonl.batch" / "state.sqlite-wal"
        end_s = time.monotonic() + 60
        while not journal.exists() or journal.stat().st_size < 40_000:
            assert run.poll() is None and time.monotonic() < end_s
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert not output.exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "30 of 31 lines are answered" in done.stdout and "1 have an error" in done.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"id-{n}" for n in range(30)]
    [error] = (tmp_path / "out.jsonl.errors").read_text().splitlines()
    assert json.loads(error)["error"]["line"] == 31
    assert not (tmp_path / "out.jsonl.batch").exists()
    assert main(command[3:]) == 2, "the output is there"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "its first line"), ("{}", "its first line"), ('{"url": "/x"}', '"/x"')],
)
def test_a_file_that_is_no_batch_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    asked = ["run-batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", "none"]
    assert main(asked) == 2 and words in capsys.readouterr().err
    assert main(["run-batch", str(tmp_path / "none"), *asked[2:]]) == 2
    assert not (tmp_path / "out.jsonl.batch").exists()


def test_another_input_does_not_go_on_with_what_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, engine = tmp_path / "in.jsonl", str(tmp_path / "none")
    source.write_text(lines(1, "m"))
    asked = ["run-batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", engine]
    assert main(asked) == 2  # there is no such engine
    capsys.readouterr()
    assert main([*asked, "--window", "1h"]) == 2 and "with 365d" in capsys.readouterr().err
    with (tmp_path / "out.jsonl.batch" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(asked) == 2 and "another run-batch" in capsys.readouterr().err
    source.write_text(lines(2, "m"))
    capsys.readouterr()
    assert main(asked) == 2 and "of another input" in capsys.readouterr().err


def test_the_window_is_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(lines(1, "m"))
    asked = ["run-batch", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", "x"]
    assert main([*asked, "--window", "soon"]) == 2
    assert "90m" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.batch").exists()
    assert make_parser().parse_args([*asked[1:], "--window", "7d"]).window == "7d"
