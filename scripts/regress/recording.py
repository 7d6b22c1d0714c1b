"""What an engine answered: the baseline that is kept in git, and what two engines are compared by.

    baseline.json           who was asked, when, where; format, suite, capabilities, noise
    answers.jsonl           one line for each prompt and task
    behaviour.jsonl         one line for each case and each exchange's shape
    speed.jsonl             one line for each turn
    scores.jsonl.gz         one line for each text: log probabilities of its tokens

The order is the suite's and no line has a time in it, so that a diff shows what changed. Knows no
server.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from enginehouse.regress.behaviour.judging import CaseResult, Conversation, Exchange
from enginehouse.regress.limits import Turns
from enginehouse.regress.speed.turn import Turn
from enginehouse.regress.subject.answers import Answer
from enginehouse.regress.subject.scores import Score
from enginehouse.runtime.engine import Manifest
from enginehouse.runtime.errors import EnginehouseError

FORMAT = 1
HEAD = "baseline.json"
_MOST_BYTES = 256 << 20  # of a file, unpacked
_FILES = {HEAD, "answers.jsonl", "behaviour.jsonl", "speed.jsonl", "scores.jsonl.gz"}


class Solved(msgspec.Struct, frozen=True, tag="task"):
    """Whether a task's answer began as it should."""

    name: str
    kind: str
    right: bool
    said: str


class Noise(msgspec.Struct, frozen=True):
    """How far an engine is from itself: KL divergence, nats a position, mean and largest, of
    answers among others, and with a known prefix, from those given alone. None where it tells no
    logprobs.
    """

    batch_mean: float | None = None
    batch_max: float | None = None
    prefix_mean: float | None = None
    prefix_max: float | None = None
    parted: int = 0  # answers whose text was another's

    @property
    def mean(self) -> float:
        return max(self.batch_mean or 0.0, self.prefix_mean or 0.0)

    @property
    def max(self) -> float:
        return max(self.batch_max or 0.0, self.prefix_max or 0.0)


class Head(msgspec.Struct, frozen=True):
    """server: its kind, as it calls itself. groups: what was asked; loads: how, of speed. left_out:
    what could not be asked, each with the reason. peak_bytes: of the server's memory, the largest
    that was seen. start_s: of each start.
    """

    format: int
    suite: str
    suite_digest: str
    target: str
    kind: str
    is_ours: bool
    model: str
    created: str
    manifest: Manifest | None
    machine: dict[str, str]
    left_out: dict[str, str]
    noise: Noise
    server: str = ""
    groups: list[str] = []
    loads: Turns | None = None
    start_s: list[float] = []
    peak_bytes: int | None = None


class Recording(msgspec.Struct, frozen=True):
    """Everything that one engine answered to a suite."""

    head: Head
    scores: list[Score]
    answers: list[Answer]
    solved: list[Solved]
    behaviour: Conversation
    turns: list[Turn]


def write_recording(recording: Recording, folder: Path) -> None:
    """Into a new folder or over an older recording; its head last, so that none is half there."""
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD).unlink(missing_ok=True)
    cases = recording.behaviour
    for name, rows in (
        ("answers.jsonl", [*recording.answers, *recording.solved]),
        ("behaviour.jsonl", [*cases.results, *cases.exchanges]),
        ("speed.jsonl", recording.turns),
    ):
        _put(folder / name, _lines(rows))
    # Without a time in its header, the same scores are the same bytes.
    _put(folder / "scores.jsonl.gz", gzip.compress(_lines(recording.scores), mtime=0))
    head = msgspec.json.format(msgspec.json.encode(recording.head), indent=1)
    _put(folder / HEAD, head + b"\n")


def check_place(folder: Path) -> None:
    """EnginehouseError for a folder of something else than a recording, whole or half."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EnginehouseError(f"{folder} is a file; name a folder")
    if not is_recording(folder) and not {path.name for path in folder.iterdir()} <= _FILES:
        raise EnginehouseError(f"{folder} holds something that is no baseline; name a new folder")


def is_recording(path: Path) -> bool:
    return (path / HEAD).is_file()


def read_recording(folder: Path) -> Recording:
    """Raises EnginehouseError for what is none, or another version's."""
    try:
        raw = msgspec.json.decode((folder / HEAD).read_bytes())
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise EnginehouseError(
                f"{folder / HEAD} has format {found}; this version reads {FORMAT}: record it again"
            )
        answers = _rows(folder / "answers.jsonl", Answer | Solved)
        cases = _rows(folder / "behaviour.jsonl", CaseResult | Exchange)
        return Recording(
            msgspec.convert(raw, Head),
            _rows(folder / "scores.jsonl.gz", Score),
            [row for row in answers if isinstance(row, Answer)],
            [row for row in answers if isinstance(row, Solved)],
            Conversation(
                [row for row in cases if isinstance(row, CaseResult)],
                [row for row in cases if isinstance(row, Exchange)],
            ),
            _rows(folder / "speed.jsonl", Turn),
        )
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise EnginehouseError(
            f"{folder} cannot be read as a baseline: {error}; record it again with "
            "`enginehouse regress record`"
        ) from None


def _lines(rows: Sequence[Any]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _rows(path: Path, kind: Any) -> list[Any]:
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path.name} holds more than {_MOST_BYTES} bytes")
    decoder = msgspec.json.Decoder(kind)
    return [decoder.decode(line) for line in content.splitlines()]


def _put(path: Path, content: bytes) -> None:
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content)
    half.replace(path)
