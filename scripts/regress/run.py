"""A run, from what is named to an outcome: open, ask, take turns, judge. Knows no check."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from enginehouse.regress.behaviour.judging import judge_behaviour
from enginehouse.regress.collect import GROUPS, Collector
from enginehouse.regress.explain import explain
from enginehouse.regress.findings import Finding, verdict_of
from enginehouse.regress.judge.asked import judge_asked
from enginehouse.regress.judge.comparison import Comparison
from enginehouse.regress.judge.numerics import (
    judge_divergence,
    judge_greedy,
    judge_perplexity,
    judge_self,
    perplexity_ratios,
    text_divergences,
)
from enginehouse.regress.judge.quality import judge_tasks
from enginehouse.regress.judge.reference import judge_reference, reference_divergences
from enginehouse.regress.judge.speed import (
    judge_memory,
    judge_recorded,
    judge_starts,
    judge_turns,
)
from enginehouse.regress.judge.tokens import judge_tokens
from enginehouse.regress.limits import Limits
from enginehouse.regress.numerics.truth import open_reference
from enginehouse.regress.outcome import (
    FORMAT,
    Described,
    LoadFigures,
    Outcome,
    TextDivergence,
)
from enginehouse.regress.recording import Recording, is_recording, read_recording
from enginehouse.regress.speed.loads import alone, take_all_turns
from enginehouse.regress.speed.turns import LoadTurns
from enginehouse.regress.subject.subject import Subject, open_subject, time_start
from enginehouse.regress.suite.suite import Suite
from enginehouse.runtime.engine import Manifest
from enginehouse.runtime.errors import EnginehouseError
from enginehouse.server.client.connection import ServerUnreachable, is_address

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is asked of whom. new, baseline: an engine directory, a URL, or, of the baseline, a
    recording. groups: of GROUPS. model, api_key: of a URL; without a key of its own the baseline's
    takes the same.
    """

    new: str
    baseline: str | None
    suite: Suite
    limits: Limits
    reference: str | None = None
    groups: Sequence[str] = GROUPS
    model: str | None = None
    api_key: str | None = None
    baseline_model: str | None = None
    baseline_api_key: str | None = None

    @property
    def cost(self) -> str:
        """What a run takes, in words."""
        suite, turns = self.suite, self.limits.turns
        rival = self.baseline if self.baseline and not is_recording(Path(self.baseline)) else None
        sides = "each of two engines, both in memory" if rival else "one engine"
        parts = {
            "numerics": f"{len(suite.texts)} texts, {len(suite.prompts)} prompts",
            "quality": f"{len(suite.tasks)} tasks",
            "behaviour": "every field of the API",
        }
        asks = ", ".join(text for group, text in parts.items() if group in self.groups)
        loads = ", ".join(map(str, turns.clients))
        speed = (
            f"; turns at {loads} clients until they are settled, at most {turns.seconds:g} s each"
            if "speed" in self.groups
            else ""
        )
        return f"{asks or 'nothing'} to {sides}{speed}"


def record(plan: Plan, say: Say) -> Recording:
    """Ask the new engine alone."""
    with (
        _logs() as logs,
        open_subject(plan.new, logs / "new.log", model=plan.model, api_key=plan.api_key) as subject,
    ):
        return _collected(plan, subject, say, with_turns=True)


def run(plan: Plan, say: Say) -> Outcome:
    """Judge the new engine. Raises EnginehouseError when it could not be asked."""
    began = time.monotonic()
    _check(plan)
    old, recorded = _recording_of(plan)
    loads: list[LoadTurns] = []
    starts: tuple[list[float], list[float]] = ([], [])
    with _logs() as logs:
        with ExitStack() as stack:
            rival: Subject | None = None
            if plan.baseline is not None and not recorded:
                rival = stack.enter_context(
                    open_subject(
                        plan.baseline,
                        logs / "old.log",
                        model=plan.baseline_model,
                        api_key=plan.baseline_api_key or plan.api_key,
                    )
                )
            subject = stack.enter_context(
                open_subject(plan.new, logs / "new.log", model=plan.model, api_key=plan.api_key)
            )
            before = old.head.manifest if old is not None else rival.manifest if rival else None
            for sentence in explained(before, subject.manifest) if plan.baseline else []:
                say(sentence)
            if rival is not None:
                old = _collected(plan, rival, say, with_turns=False)
            new = _collected(plan, subject, say, with_turns=rival is None)
            if rival is not None and "speed" in plan.groups:
                loads = take_all_turns(rival, subject, plan.limits, say)
                old, new = _with_memory(old, rival), _with_memory(new, subject)
        if rival is not None and "speed" in plan.groups:  # when neither takes the other's room
            starts = _starts(rival, subject, plan.limits.turns.starts, logs, say)
    return _judged(plan, old, new, recorded, loads, starts, began, say)


def _check(plan: Plan) -> None:
    """What can be known to fail, before anybody is asked."""
    if plan.baseline is not None and is_address(plan.new) and plan.new == plan.baseline:
        raise EnginehouseError(
            f"{plan.new} is both sides, and would know the other side's prompts; name two servers, "
            "or leave --baseline out"
        )
    if plan.reference is not None and "numerics" in plan.groups:
        open_reference(plan.reference)


def _recording_of(plan: Plan) -> tuple[Recording | None, bool]:
    """The baseline, where it is a recording, and whether it is one."""
    if plan.baseline is None or not is_recording(Path(plan.baseline)):
        return None, False
    old = read_recording(Path(plan.baseline))
    _check_suite(old, plan)
    return old, True


@contextmanager
def _logs() -> Iterator[Path]:
    """A folder for servers' logs, which stay when something fails: the error names them."""
    folder = Path(tempfile.mkdtemp(prefix="enginehouse-regress-"))
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder)


def explained(old: Manifest | None, new: Manifest | None) -> list[str]:
    """What differs between the builds, by their manifests, or that it is not known."""
    if old is None or new is None:
        return ["A side has no manifest here: what differs between them is not recorded."]
    return explain(old, new)


def _check_suite(old: Recording, plan: Plan) -> None:
    if old.head.suite_digest != plan.suite.digest:
        raise EnginehouseError(
            f"{plan.baseline} was recorded with another suite ({old.head.suite}, "
            f"{old.head.suite_digest[:19]}; this is {plan.suite.name}, {plan.suite.digest[:19]}): "
            "record it again, or give that suite"
        )


def _collected(plan: Plan, subject: Subject, say: Say, *, with_turns: bool) -> Recording:
    recording = Collector(
        subject, plan.suite, plan.groups, lambda what: say(f"{subject.target}: {what}")
    ).collect()
    if not with_turns or "speed" not in plan.groups:
        return recording
    head = msgspec.structs.replace(recording.head, loads=plan.limits.turns)
    try:
        recording = msgspec.structs.replace(
            recording, head=head, turns=alone(subject, plan.limits, say)
        )
    except ServerUnreachable:
        raise
    except EnginehouseError as error:
        left_out = {**head.left_out, "turns": str(error)}
        head = msgspec.structs.replace(head, left_out=left_out)
        recording = msgspec.structs.replace(recording, head=head)
    return _with_memory(recording, subject)


def _with_memory(recording: Recording | None, subject: Subject) -> Recording:
    """The largest that was seen: after the suite, and after the loads."""
    assert recording is not None
    seen = [size for size in (recording.head.peak_bytes, subject.memory()) if size is not None]
    head = msgspec.structs.replace(recording.head, peak_bytes=max(seen, default=None))
    return msgspec.structs.replace(recording, head=head)


def _starts(
    old: Subject, new: Subject, count: int, logs: Path, say: Say
) -> tuple[list[float], list[float]]:
    """Seconds to ready of engine directories, in turns; none of URLs."""
    if old.server is None or new.server is None:
        return [], []
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(count):
        say(f"start {number + 1} of {count} of each")
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for side in order:
            found[side].append(time_start((old, new)[side].target, logs / "start.log"))
    return found


def _judged(
    plan: Plan,
    old: Recording | None,
    new: Recording,
    recorded: bool,
    loads: list[LoadTurns],
    starts: tuple[list[float], list[float]],
    began: float,
    say: Say,
) -> Outcome:
    both = Comparison(old, new, plan.limits)
    divergence, ratios = text_divergences(both), perplexity_ratios(both)
    truth, old_truth = _references(plan, old, new, say)
    findings = list(_findings(plan, both, loads, starts))
    if "numerics" in plan.groups:
        numerics = [*judge_divergence(both, divergence), *judge_perplexity(both, ratios)]
        numerics += judge_reference(both, truth, old_truth) if plan.reference else []
        findings = [*numerics, *findings]
    return Outcome(
        format=FORMAT,
        verdict=verdict_of(findings),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 1),
        suite=f"{plan.suite.name} {plan.suite.digest[:19]}",
        new=_described(new),
        old=None if old is None else _described(old, recorded=recorded),
        reference=plan.reference if "numerics" in plan.groups else None,
        explained=[] if old is None else explained(old.head.manifest, new.head.manifest),
        findings=findings,
        divergence=divergence,
        reference_divergence=truth,
        perplexity=ratios,
        loads=_figures(loads, old, new),
    )


def _findings(
    plan: Plan,
    both: Comparison,
    loads: list[LoadTurns],
    starts: tuple[list[float], list[float]],
) -> Iterator[Finding]:
    if "numerics" in plan.groups:
        yield from judge_asked(both)
        yield from judge_tokens(both, plan.suite)
        yield from judge_greedy(both)
        yield from judge_self(both)
    if "quality" in plan.groups:
        yield from judge_tasks(both)
    if "behaviour" in plan.groups:
        ours = both.new.head.is_ours
        before = both.old.behaviour if both.old and both.same_server else None
        other = not both.same_source
        yield from judge_behaviour(before, both.new.behaviour, is_ours=ours, other_template=other)
    if "speed" in plan.groups:
        yield from judge_turns(loads, plan.limits)
        if not loads:
            yield from judge_recorded(both)
        yield from judge_starts(*starts, plan.limits)
        yield from judge_memory(both)


def _references(
    plan: Plan, old: Recording | None, new: Recording, say: Say
) -> tuple[list[TextDivergence], list[TextDivergence]]:
    """Divergence from the source of the new engine, and of the old where it is of that source."""
    if plan.reference is None or "numerics" not in plan.groups:
        return [], []
    truth = reference_divergences(new, plan.reference, lambda what: say(f"source: {what}"))
    if old is None or not Comparison(old, new, plan.limits).same_source or not old.scores:
        return truth, []
    return truth, reference_divergences(old, plan.reference, lambda what: say(f"source: {what}"))


def _described(recording: Recording, *, recorded: bool = False) -> Described:
    head = recording.head
    facts = dict(head.machine)
    if head.manifest is not None:
        choices = head.manifest.choices
        facts["backend"] = head.manifest.backend
        facts["form"] = str(choices.get("quant"))
        facts["GPUs"] = str(int(choices.get("tp") or 1) * int(choices.get("pp") or 1))
        facts["built"] = head.manifest.created
    facts |= {f"left out: {name}": why for name, why in head.left_out.items()}
    kind = "recording" if recorded else head.kind
    name = head.target if is_address(head.target) else Path(head.target).name
    digest = head.manifest.digest if head.manifest else None
    return Described(name, kind, digest, {"model": head.model, **facts})


def _figures(loads: list[LoadTurns], old: Recording | None, new: Recording) -> list[LoadFigures]:
    """Of turns that were taken together, else of those that each side took alone."""
    sides = {
        load.clients: ([pair.old for pair in load.pairs], [pair.new for pair in load.pairs])
        for load in loads
    }
    for turn in new.turns if not loads else []:
        sides.setdefault(turn.clients, ([], []))[1].append(turn)
    for turn in old.turns if old is not None and not loads else []:
        sides.setdefault(turn.clients, ([], []))[0].append(turn)
    return [
        LoadFigures(
            clients,
            [turn.tokens_per_s for turn in before],
            [turn.tokens_per_s for turn in after],
            [value for turn in before for value in turn.ttft_ms],
            [value for turn in after for value in turn.ttft_ms],
            [value for turn in before for value in turn.gap_ms],
            [value for turn in after for value in turn.gap_ms],
        )
        for clients, (before, after) in sorted(sides.items())
    ]
