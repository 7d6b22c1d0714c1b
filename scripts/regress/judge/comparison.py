"""What a judge is given: two recordings, how near their builds are, and limits. Judges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from enginehouse.regress.explain import Relation, relation_of
from enginehouse.regress.findings import Figure, Finding, Status
from enginehouse.regress.limits import Limits
from enginehouse.regress.recording import Recording
from enginehouse.regress.subject.answers import Answer
from enginehouse.regress.subject.scores import Score


@dataclass(frozen=True)
class Comparison:
    """old: None where an engine is judged alone."""

    old: Recording | None
    new: Recording
    limits: Limits

    @property
    def relation(self) -> Relation:
        if self.old is None:
            return Relation.UNKNOWN
        return relation_of(self.old.head.manifest, self.new.head.manifest)

    @property
    def same_source(self) -> bool:
        return self.relation is not Relation.OTHER_WEIGHTS

    @property
    def noise_mean(self) -> float:
        """Nats a position by which either engine differs from itself, mean."""
        return max(side.head.noise.mean for side in (self.old, self.new) if side is not None)

    @property
    def noise_max(self) -> float:
        return max(side.head.noise.max for side in (self.old, self.new) if side is not None)

    def scores(self) -> Iterator[tuple[Score, Score]]:
        """Texts that both scored, as far as the shorter context goes, with the same ids."""
        news = {score.name: score for score in self.new.scores}
        for old in self.old.scores if self.old else []:
            new = news.get(old.name)
            if new is None:
                continue
            count = min(len(old.ids), len(new.ids))
            if new.ids[:count] == old.ids[:count]:
                yield _cut(old, count), _cut(new, count)

    def answers(self) -> Iterator[tuple[Answer, Answer]]:
        """Prompts that both answered."""
        news = {answer.name: answer for answer in self.new.answers}
        for old in self.old.answers if self.old else []:
            if old.name in news:
                yield old, news[old.name]


def _cut(score: Score, count: int) -> Score:
    """Of its first `count` tokens alone."""
    return replace(
        score,
        ids=score.ids[:count],
        chosen=score.chosen[: count - 1],
        top=score.top[: count - 1],
    )


def found(group: str, check: str, passed: bool, sentence: str, **figures: Figure) -> Finding:
    """A finding of a check that could be judged."""
    status = Status.PASSED if passed else Status.REGRESSED
    return Finding(group, check, status, sentence, figures)


def not_judged(group: str, check: str, why: str, **figures: Figure) -> Finding:
    return Finding(group, check, Status.NOT_JUDGED, why, figures)
