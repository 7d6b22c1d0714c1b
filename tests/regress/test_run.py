"""A whole run on tiny engines of the compiled CPU backend: two of them, a recording, a URL."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from enginehouse.regress import collect
from enginehouse.regress.behaviour.asker import Asker, Known, NotAsked
from enginehouse.regress.behaviour.endings import end_token, min_tokens
from enginehouse.regress.behaviour.judging import CaseResult, Conversation, Exchange
from enginehouse.regress.collect import GROUPS
from enginehouse.regress.findings import Status, Verdict
from enginehouse.regress.limits import Limits, load_limits
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.recording import read_recording
from enginehouse.regress.run import Plan, run
from enginehouse.regress.speed import loads
from enginehouse.regress.speed.turn import Turn
from enginehouse.regress.speed.turns import Asked
from enginehouse.regress.subject import subject as subjects
from enginehouse.regress.subject.api import Api
from enginehouse.regress.subject.subject import Subject
from enginehouse.regress.suite.long_texts import ledger
from enginehouse.regress.suite.suite import Prompt, Suite, Task, Text
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.verbs.main import main
from makers.behaviour import Recorded
from makers.engines import EngineMaker
from makers.gunicorn_server import Server

SUITE = Suite(
    "tiny",
    [Text("ledger", "long", ledger(4))],
    [
        Prompt("continue", prompt="In the morning the stoker", max_tokens=8),
        Prompt("ask", messages=[{"role": "user", "content": "How far is it?"}], max_tokens=8),
    ],
    [Task("sums.0", "sums", "1 + 1 =", "2")],
)
# A small machine's noise is no matter here: turns are few, and margins wide.
WIDE = {"tokens_per_s": 0.9, "ttft_ms": 0.9, "step_ms": 0.9, "start_s": 0.9, "memory_mib": 0.1}
BALLAST = """
import signal, subprocess, sys
ballast = b"\\1" * int(sys.argv[1])
server = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGTERM, lambda number, frame: server.terminate())
raise SystemExit(server.wait())
"""


def few_turns() -> Limits:
    limits = load_limits()
    turns = replace(limits.turns, clients=[1, 3], tokens=8, least=2, most=2, seconds=9, starts=1)
    return replace(limits, turns=turns, speed=WIDE)


def plan(new: Path | str, baseline: Path | str | None, *groups: str) -> Plan:
    before = None if baseline is None else str(baseline)
    return Plan(str(new), before, SUITE, few_turns(), groups=groups or GROUPS)


def statuses(outcome: Outcome) -> dict[str, Status]:
    return {finding.check: finding.status for finding in outcome.findings}


@pytest.fixture(scope="module")
def engine(make_engine: EngineMaker) -> Path:
    return make_engine(quant="int4", backend="cpu", until="compile")


def test_an_engine_beside_itself_passes_in_every_group(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Conversation([CaseResult("stop", True, "")], [Exchange("chat", ["id: string"])])
    monkeypatch.setattr(collect, "converse", lambda *_: short)  # test_converse.py asks it all
    said: list[str] = []
    outcome = run(plan(engine, engine), said.append)
    assert outcome.verdict is not Verdict.REGRESSED, outcome.findings
    assert said[0].startswith("Both hold the same files") and outcome.explained == said[:1]
    assert {finding.group for finding in outcome.findings} == set(GROUPS)
    unsure = {each.group for each in outcome.findings if each.status is Status.CANNOT_TELL}
    assert unsure <= {"speed"}  # two turns on a busy machine
    found = statuses(outcome)
    assert found["kl"] is found["greedy"] is found["batch"] is found["memory_mib"] is Status.PASSED
    assert [load.clients for load in outcome.loads] == [1, 3]
    assert all(len(load.new_ttft_ms) == 2 * load.clients for load in outcome.loads)


def test_memory_up_by_a_third_is_flagged(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, asked = subjects.serve_command, []

    def with_ballast(target: str, port: int) -> list[str]:
        asked.append(target)
        command = serve(target, port)
        return (
            command if len(asked) == 1 else [sys.executable, "-c", BALLAST, "120000000", *command]
        )

    monkeypatch.setattr(subjects, "serve_command", with_ballast)
    limits = few_turns()
    few = replace(limits, turns=replace(limits.turns, clients=[1], starts=0))
    outcome = run(replace_limits(plan(engine, engine, "speed"), few), lambda line: None)
    assert statuses(outcome)["memory_mib"] is Status.REGRESSED, outcome.findings


def replace_limits(plan: Plan, limits: Limits) -> Plan:
    return Plan(plan.new, plan.baseline, plan.suite, limits, groups=plan.groups)


def test_the_command_records_judges_and_reports(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """record, then run against what was recorded, of an own suite; status 0, and four reports."""
    suite, limits = tmp_path / "suite.yaml", tmp_path / "limits.yaml"
    suite.write_text("name: own\nprompts: [{name: p, prompt: A whistle, max_tokens: 6}]\n")
    turns = "turns: {clients: [1], tokens: 6, least: 2, most: 2}\n"
    limits.write_text(turns + "recorded_same: 0.98\n")  # the machine is busy with other tests
    asked = ["--suite", str(suite), "--limits", str(limits), "--only", "numerics", "speed"]
    baseline, out = tmp_path / "baseline", tmp_path / "out"
    assert main(["regress", "record", str(engine), "-o", str(baseline), *asked]) == 0
    assert read_recording(baseline).head.suite == "own"
    judged = [str(engine), "--baseline", str(baseline), "-o", str(out), *asked]
    assert main(["regress", "run", *judged]) == 0
    assert {path.suffix for path in out.iterdir()} == {".json", ".xml", ".md", ".html"}
    assert "passed" in capsys.readouterr().out
    suite.write_text(suite.read_text().replace("whistle", "cloud"))
    assert main(["regress", "run", *judged]) == 2
    assert "was recorded with another suite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "none", "--only", "speed"], "none is neither an engine directory nor an address"),
        (["record", "a"], "record wants --out DIR"),
        (["explain", "a"], "explain takes 2 of engine or URL, not 1"),
        (["explain", "a", "b", "--only", "speed"], "--only is of no use to explain"),
        (["record", "a", "-o", "b", "--baseline", "c"], "--baseline is of no use to record"),
        (["record", "a", "-o", __file__], "is a file; name a folder"),
        (["run", "a", "--out", __file__], "is a file; wanted a folder"),
        (["run", "http://h:1", "--baseline", "http://h:1"], "http://h:1 is both sides"),
        (["run", "http://127.0.0.1:9", "--reference", "none"], "none"),
        (["judge", "a"], "'judge' is none of record, run, explain"),
        (["run", "http://127.0.0.1:9", "--only", "speed"], "does not answer"),
    ],
)
def test_what_cannot_run_has_status_2_and_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["regress", *words])
    except SystemExit as end:
        status = int(str(end.code))
    error = capsys.readouterr().err
    assert status == 2 and said in error


def test_explain_reads_two_manifests(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regress", "explain", str(engine), str(engine)]) == 0
    head, sentence = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{engine}, of 20") and head.endswith(": rebuild")
    assert sentence.startswith("- Both hold the same files")


def test_a_url_of_our_own_server_is_asked_what_can_be_asked_of_it(
    served: Server, endless_engine: Path, known: Known, recorded: Recorded
) -> None:
    outcome = run(plan(served.url, endless_engine, "numerics", "speed"), lambda line: None)
    found = statuses(outcome)
    assert outcome.verdict is not Verdict.REGRESSED, outcome.findings
    assert found["kl"] is found["greedy"] is found["asked"] is Status.PASSED
    assert found["memory_mib"] is found["start_s"] is Status.NOT_JUDGED
    assert outcome.old is not None and outcome.old.kind == "engine" and outcome.new.kind == "url"
    unknown = Asker(recorded, replace(known, eos_token_ids=None))
    for case in (end_token, min_tokens):
        with pytest.raises(NotAsked, match="not known from outside"):
            case(unknown)


def test_an_engine_that_fails_under_load_is_a_finding_and_ends_no_run(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loads.take_turn

    def take_turn(api: Api, prompts: Sequence[Asked], *args: Any, **kwargs: Any) -> Turn:
        if len(prompts) == 3 and api is broken[0]:
            raise EnginehouseError("a stream of the load failed: it was lost")
        return whole(api, prompts, *args, **kwargs)

    broken: list[Api] = []
    real = loads.Load.__init__

    def noted(self: loads.Load, subject: Subject, limits: Limits) -> None:
        broken[:] = [subject.api]  # the last is the new engine's
        real(self, subject, limits)

    monkeypatch.setattr(loads, "take_turn", take_turn)
    monkeypatch.setattr(loads.Load, "__init__", noted)
    outcome = run(plan(engine, engine, "speed"), lambda line: None)
    found = statuses(outcome)
    assert found["streams.3"] is Status.REGRESSED and "tokens_per_s.1" in found
