"""How far is an engine from its own source in float32? Knows no server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from enginehouse.regress.findings import Finding
from enginehouse.regress.judge.comparison import Comparison, found, not_judged
from enginehouse.regress.numerics.divergence import kl_of_tops
from enginehouse.regress.numerics.truth import true_tops
from enginehouse.regress.outcome import TextDivergence
from enginehouse.regress.recording import Recording

GROUP = "numerics"
_NUM_TOP = 32


def reference_divergences(
    recording: Recording, checkpoint: str, advance: Callable[[str], None]
) -> list[TextDivergence]:
    """KL(source || engine) of each text that the engine scored."""
    scores = recording.scores
    if not scores:
        return []
    truths = true_tops(checkpoint, [score.ids for score in scores], _NUM_TOP, advance)
    return [
        TextDivergence(score.name, [kl_of_tops(a, b) for a, b in zip(top, score.top, strict=True)])
        for score, (_, top) in zip(scores, truths, strict=True)
    ]


def judge_reference(
    both: Comparison, new: list[TextDivergence], old: list[TextDivergence]
) -> Iterator[Finding]:
    """old: of the old engine, [] where it is not compared with the same source."""
    values = [value for text in new for value in text.kl]
    if not values:
        yield not_judged(GROUP, "reference_kl", "The engine's texts are not scored.")
        return
    mean = sum(values) / len(values)
    manifest = both.new.head.manifest
    quant = str(manifest.choices.get("quant")) if manifest else None
    limit = both.limits.reference_kl.get(quant or "")
    told = f"KL from the source in float32: mean {mean:.3g}, largest {max(values):.3g} nats"
    if limit is None:
        yield not_judged(
            GROUP, "reference_kl", f"{told}; the quantisation is not known.", mean=mean
        )
        return
    before = [value for text in old for value in text.kl]
    if before:
        old_mean = sum(before) / len(before)
        limit = min(limit, max(old_mean * both.limits.reference_kl_times, 1e-4))
        told += f", the old engine's mean {old_mean:.3g}"
    sentence = f"{told}; wanted at most {limit:.3g} ({quant})."
    yield found(GROUP, "reference_kl", mean <= limit, sentence, mean=mean, limit=limit)
