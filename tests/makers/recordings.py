"""Recordings as an engine would leave them, made up: a few texts, answers and tasks."""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from enginehouse.regress.behaviour.judging import CaseResult, Conversation, Exchange
from enginehouse.regress.recording import FORMAT, Head, Noise, Recording, Solved
from enginehouse.regress.speed.turn import Turn
from enginehouse.regress.subject.answers import Answer
from enginehouse.regress.subject.scores import Score
from enginehouse.runtime.engine import FileRecord, Limits, Manifest, ModelRecord

MANIFEST = Manifest(
    format=1,
    name="mine",
    created="2026-01-01T00:00:00+00:00",
    backend="cpu",
    model=ModelRecord("mine", (2,)),
    limits=Limits(4096, 64, 512, 32),
    source={"digest": "sha256:aa"},
    choices={"quant": "int8", "tp": 1},
    versions={"torch": "2.13.0"},
    files={"rank0.safetensors": FileRecord(9, "00")},
    digest="sha256:old",
)
_HEAD = Head(
    format=FORMAT,
    suite="made up",
    suite_digest="sha256:suite",
    target="engines/mine",
    kind="engine",
    is_ours=True,
    model="mine",
    created="2026-01-01T00:00:00+00:00",
    manifest=MANIFEST,
    machine={"cpu": "a CPU", "cores": "2"},
    left_out={},
    noise=Noise(0.0, 0.0, 0.0, 0.0, 0),
    start_s=[1.5],
    peak_bytes=300 << 20,
)


def score(name: str = "text", *, shift: float = 0.0, kind: str = "prose") -> Score:
    """60 positions of three tokens; shift moves the first's share, nats."""
    first = math.log(0.6) + shift
    second = math.log(1 - math.exp(first) - 0.05)
    tops = [{5: first, 6: second, 7: math.log(0.04)} for _ in range(60)]
    return Score(name, kind, [1] + [5] * 60, [first] * 60, tops)


def answer(text: str = "a b c d", *, name: str = "ask", finish: str = "stop", **kw: Any) -> Answer:
    """A token for each word; the second likeliest is a nat away."""
    words = text.split(" ")
    top = [{word: math.log(0.6), "other": math.log(0.6) - 1} for word in words]
    ids = kw.get("prompt_ids", [1, 2, 3])
    return Answer(name, ids, text, finish, words, [math.log(0.6)] * len(words), top)


def recording(**changes: Any) -> Recording:
    """changes: of a Recording's fields, or of its head's."""
    made = Recording(
        head=_HEAD,
        scores=[score()],
        answers=[answer()],
        solved=[Solved(f"sums.{i}", "sums", i % 2 == 0, "4") for i in range(20)],
        behaviour=Conversation(
            [CaseResult("stop", True, "")], [Exchange("chat", ["choices[].index: integer"])]
        ),
        turns=[Turn(1, 32, 0.2 + i / 1000, [30.0], [5.0], [5.0] * 31) for i in range(8)],
    )
    heads = {key: changes.pop(key) for key in list(changes) if key in Head.__struct_fields__}
    return replace(made, head=replace(_HEAD, **heads), **changes)
