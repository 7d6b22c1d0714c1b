"""Does the new engine still answer what the old one answered? Knows no number."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.regress.findings import Finding
from enginehouse.regress.judge.comparison import Comparison, found, not_judged
from enginehouse.regress.recording import Recording

GROUP = "numerics"


def judge_asked(both: Comparison) -> Iterator[Finding]:
    """Texts and prompts that only the new one refuses."""
    answered = _answered(both.old) if both.old and both.same_server else set()
    if not answered:
        return
    gone = {name: why for name, why in both.new.head.left_out.items() if name in answered}
    if not gone:
        yield found(GROUP, "asked", True, "The new engine refuses nothing that the old one took.")
        return
    name, why = min(gone.items())
    told = f"{len(gone)} of {len(answered)} that the old engine took are refused, as {name}: {why}"
    if _is_shorter(both):
        yield not_judged(GROUP, "asked", f"{told}; the new engine is built for shorter contexts.")
        return
    yield found(GROUP, "asked", False, f"{told}.", refused=len(gone), of=len(answered))


def _answered(recording: Recording) -> set[str]:
    """By the names under which a collector leaves them out."""
    texts = {f"text {score.name}" for score in recording.scores}
    prompts = {f"prompt {answer.name}" for answer in recording.answers}
    return texts | prompts


def _is_shorter(both: Comparison) -> bool:
    old, new = both.old.head.manifest if both.old else None, both.new.head.manifest
    if old is None or new is None:
        return False
    return new.limits.max_seq_len < old.limits.max_seq_len
