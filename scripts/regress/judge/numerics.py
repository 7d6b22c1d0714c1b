"""Are the new engine's log probabilities what they were, and what they should be? By limits.

Knows no server and no direction of speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from enginehouse.regress.explain import Relation
from enginehouse.regress.findings import Figure, Finding, Status
from enginehouse.regress.judge.comparison import (
    Comparison,
    found,
    may_be_same_prompt,
    not_judged,
)
from enginehouse.regress.numerics.divergence import (
    Parting,
    answer_kl,
    first_parting,
    kl_of_tops,
)
from enginehouse.regress.numerics.perplexity import Ratio, perplexity, perplexity_ratio
from enginehouse.regress.outcome import PerplexityRatio, TextDivergence
from enginehouse.regress.subject.answers import Answer

GROUP = "numerics"


def text_divergences(both: Comparison) -> list[TextDivergence]:
    """KL(old || new) of each text that both scored."""
    return [
        TextDivergence(old.name, [kl_of_tops(a, b) for a, b in zip(old.top, new.top, strict=True)])
        for old, new in both.scores()
    ]


def judge_divergence(both: Comparison, texts: Sequence[TextDivergence]) -> Iterator[Finding]:
    """kl: of scored texts. answer_kl: of greedy answers, as far as both say the same."""
    if both.old is None:
        return
    values = [value for text in texts for value in text.kl]
    if values:
        yield _judged_kl(both, "kl", values, f"{len(texts)} texts, {len(values)} positions")
    elif both.old.scores and not both.new.scores and both.same_server:
        why = both.new.head.left_out.get("texts", "they have other tokens")
        yield found(GROUP, "kl", False, f"The old engine scores its texts, the new one not: {why}.")
    else:
        why = both.old.head.left_out.get("texts", "no text has the same tokens on both sides")
        yield not_judged(GROUP, "kl", f"No text is scored by both: {why}.")
    pairs = [pair for pair in both.answers() if may_be_same_prompt(*pair)]
    values = [
        value for old, new in pairs for value in answer_kl(old.tokens, new.tokens, old.top, new.top)
    ]
    if not values:
        yield not_judged(GROUP, "answer_kl", "No answer has log probabilities on both sides.")
        return
    finding = _judged_kl(both, "answer_kl", values, f"{len(values)} tokens of answers")
    yield finding if _are_known(both, pairs) else _told(finding)


def _are_known(both: Comparison, pairs: Sequence[tuple[Answer, Answer]]) -> bool:
    """Whether answers can be held against each other: of another kind of server only if it is known
    that it read the same tokens.
    """
    told = all(old.prompt_ids is not None and new.prompt_ids is not None for old, new in pairs)
    return told or both.same_server


def _told(finding: Finding) -> Finding:
    sentence = f"{finding.sentence} Another kind of server, which tells no token ids: not judged."
    return replace(finding, status=Status.NOT_JUDGED, sentence=sentence)


def _judged_kl(both: Comparison, check: str, values: list[float], of: str) -> Finding:
    mean, largest = sum(values) / len(values), max(values)
    told = f"KL of the new engine from the old: mean {mean:.3g}, largest {largest:.3g} nats ({of})"
    relation = both.relation
    if relation is Relation.OTHER_WEIGHTS:
        return not_judged(
            GROUP, check, f"{told}; another source may say something else.", mean=mean
        )
    limit, times = both.limits.kl[relation.value], both.limits.noise_times
    most_mean = max(limit.mean, times * both.noise_mean)
    most = max(limit.largest, times * both.noise_max)
    words = relation.value.replace("_", " ")
    return found(
        GROUP,
        check,
        mean <= most_mean and largest <= most,
        f"{told}; wanted at most {most_mean:.3g} and {most:.3g} ({words}).",
        mean=mean,
        largest=largest,
        mean_limit=most_mean,
        largest_limit=most,
    )


def judge_greedy(both: Comparison) -> Iterator[Finding]:
    """Where greedy answers part, and how near the tie was."""
    pairs = [pair for pair in both.answers() if may_be_same_prompt(*pair)]
    if both.old is None or not pairs:
        return
    for finding in _judged_greedy(both, pairs):
        yield finding if _are_known(both, pairs) else _told(finding)


def _judged_greedy(both: Comparison, pairs: Sequence[tuple[Answer, Answer]]) -> Iterator[Finding]:
    partings = []
    for old, new in pairs:
        parting = first_parting(old.tokens, new.tokens, old.top)
        if parting.place is None and old.text != new.text:
            parting = Parting(0)  # no tokens are told, and the texts differ
        if parting.place is not None:
            partings.append((parting, old.name))
    equal = len(pairs) - len(partings)
    told = f"{equal} of {len(pairs)} greedy answers are the old ones"
    figures: dict[str, Figure] = {"equal": equal, "of": len(pairs)}
    if not partings:
        yield found(GROUP, "greedy", True, f"{told}.", **figures)
        return
    (place, tie, at_least), name = max(partings, key=lambda each: _nats(each[0]))
    preferred = f"at least {at_least:.3g}" if tie is None else f"{tie:.3g}"
    told += (
        f"; {name!r} parts at token {place}, where the old engine preferred its own by {preferred} "
        "nats"
    )
    nats = at_least if tie is None else tie
    if not both.same_source:
        yield not_judged(
            GROUP, "greedy", f"{told}; another source may answer otherwise.", **figures
        )
        return
    limit = both.limits.greedy_tie[both.relation.value]
    if both.noise_max > 0 and both.relation is Relation.REBUILD:
        limit = both.limits.greedy_tie[Relation.REORDERED.value]  # not even equal to itself
    wanted = (
        "answers of other numbers may part" if math.isinf(limit) else f"wanted at most {limit:g}"
    )
    figures |= {"tie": tie, "at_least": at_least}
    if (
        0 < limit < math.inf
        and nats <= limit
        and any(parting.tie is None for parting, _ in partings)
    ):
        untold = sum(parting.tie is None for parting, _ in partings)
        told += f"; how near {untold} were to a tie is not told"
        yield not_judged(GROUP, "greedy", f"{told}; {wanted}.", **figures)
        return
    passed = nats <= limit if limit else False
    yield found(GROUP, "greedy", passed, f"{told}; {wanted}.", **figures)


def _nats(parting: Parting) -> float:
    return parting.at_least if parting.tie is None else parting.tie


def perplexity_ratios(both: Comparison) -> list[PerplexityRatio]:
    """Of all texts, and of each kind."""
    pairs = list(both.scores())
    kinds = list(dict.fromkeys(old.kind for old, _ in pairs))
    rows = []
    for kind in ["all", *kinds] if pairs else []:
        chosen = [(old.chosen, new.chosen) for old, new in pairs if kind in ("all", old.kind)]
        ratio = perplexity_ratio([a for a, _ in chosen], [b for _, b in chosen], both.limits.level)
        rows.append(PerplexityRatio(kind, *ratio))
    return rows


def judge_perplexity(both: Comparison, ratios: Sequence[PerplexityRatio]) -> Iterator[Finding]:
    """Over all texts; kinds are told in the report."""
    values = [value for score in both.new.scores for value in score.chosen]
    if not values:
        return
    new = perplexity(values)
    if both.old is None:
        yield not_judged(
            GROUP, "perplexity", f"Perplexity {new:.4g} on the suite's texts.", new=new
        )
        return
    if not ratios:
        yield not_judged(GROUP, "perplexity", "No text has the same tokens on both sides.")
        return
    ratio = Ratio(ratios[0].ratio, ratios[0].low, ratios[0].high)
    most = 1 + both.limits.perplexity[both.relation.value]
    told = (
        f"Perplexity {new:.4g}, {ratio.ratio:.5f} times the old one's, between {ratio.low:.5f} and "
        f"{ratio.high:.5f} ({both.limits.level:.0%} confidence); wanted at most {most:g} times"
    )
    figures: dict[str, Figure] = {
        "new": new,
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "limit": most,
    }
    if ratio.low <= most < ratio.high:
        told += "; more or longer texts (--suite) would tell"
        yield Finding(GROUP, "perplexity", Status.CANNOT_TELL, f"{told}.", figures)
        return
    yield found(GROUP, "perplexity", ratio.high <= most, f"{told}.", **figures)


def judge_self(both: Comparison) -> Iterator[Finding]:
    """Is the new engine equal to itself: in a batch, and after a known prefix?"""
    head = both.new.head
    kind = head.manifest.backend if head.manifest else "url"
    limit = both.limits.self_kl.get(kind, both.limits.self_kl["url"])
    noise = head.noise
    for check, what, mean in (
        ("batch", "among 15 others", noise.batch_mean),
        ("prefix", "after a known prefix", noise.prefix_mean),
    ):
        if mean is None:
            yield not_judged(GROUP, check, "The server tells no log probabilities of answers.")
            continue
        sentence = (
            f"Answers {what} are {mean:.3g} nats a token from those alone; wanted at most "
            f"{limit:g} ({kind})."
        )
        yield found(GROUP, check, mean <= limit, sentence, mean=mean, limit=limit)
