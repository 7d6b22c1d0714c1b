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
        relation = relation_of(self.old.head.manifest, self.new.head.manifest)
        if relation is Relation.REBUILD and not self.same_machine:
            return Relation.REORDERED
        return relation

    @property
    def same_machine(self) -> bool:
        """Whether both were asked on machines that are alike, as far as is known of both."""
        if self.old is None or not self.old.head.machine or not self.new.head.machine:
            return False
        old, new = self.old.head.machine, self.new.head.machine
        return {**old, "memory": ""} == {**new, "memory": ""}

    @property
    def same_server(self) -> bool:
        """Whether both are of one kind, such as vLLM: another kind need not do the same."""
        return self.old is not None and self.old.head.server == self.new.head.server

    @property
    def same_source(self) -> bool:
        return self.relation is not Relation.OTHER_WEIGHTS

    @property
    def noise_mean(self) -> float:
        """Nats a position by which the old engine differs from itself, mean. The new one's own
        would excuse what is wrong with it.
        """
        return self.old.head.noise.mean if self.old is not None else 0.0

    @property
    def noise_max(self) -> float:
        return self.old.head.noise.max if self.old is not None else 0.0

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


def may_be_same_prompt(old: Answer, new: Answer) -> bool:
    """Whether both read the same tokens, as far as their servers tell."""
    return old.prompt_ids is None or new.prompt_ids is None or old.prompt_ids == new.prompt_ids


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
