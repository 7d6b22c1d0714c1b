"""Do both engines read and end texts alike? Tokenizer, template, end tokens. Knows no logits."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.regress.explain import Relation
from enginehouse.regress.findings import Finding
from enginehouse.regress.judge.comparison import Comparison, found, not_judged
from enginehouse.regress.suite.suite import Suite

GROUP = "numerics"


def judge_tokens(both: Comparison, suite: Suite) -> Iterator[Finding]:
    """Nothing without an old engine."""
    if both.old is None:
        return
    news = {score.name: score for score in both.new.scores}
    texts = {
        old.name: _as_far_as_both(old.ids, news[old.name].ids)
        for old in both.old.scores
        if old.name in news
    }
    chats = {prompt.name for prompt in suite.prompts if prompt.messages is not None}
    prompts = {
        old.name: (old.prompt_ids, new.prompt_ids)
        for old, new in both.answers()
        if old.prompt_ids is not None and new.prompt_ids is not None
    }
    texts |= {name: ids for name, ids in prompts.items() if name not in chats}
    yield _judged("tokenizer", "texts", texts, both)
    shown = {name: ids for name, ids in prompts.items() if name in chats}
    yield _judged("chat_template", "conversations", shown, both)
    yield _ends(both)


def _as_far_as_both(old: list[int], new: list[int]) -> tuple[list[int], list[int]]:
    """A text is cut to its engine's context."""
    count = min(len(old), len(new))
    return old[:count], new[:count]


def _judged(
    check: str, what: str, ids: dict[str, tuple[list[int], list[int]]], both: Comparison
) -> Finding:
    if not ids:
        return not_judged(GROUP, check, "A server does not tell token ids (POST /tokenize).")
    parted = [name for name, (old, new) in ids.items() if old != new]
    if not parted:
        return found(GROUP, check, True, f"All {len(ids)} {what} become the same tokens.")
    old, new = ids[parted[0]]
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    where = f"at token {place}" if place is not None else f"after {min(len(old), len(new))} tokens"
    sentence = (
        f"{len(parted)} of {len(ids)} {what} become other tokens: {parted[0]!r} parts {where} "
        f"({len(old)} tokens, now {len(new)})."
    )
    if not both.same_source:
        return not_judged(GROUP, check, f"{sentence} Another source may have its own.")
    return found(GROUP, check, False, sentence, parted=len(parted), of=len(ids))


def _ends(both: Comparison) -> Finding:
    """An answer that ended by itself, and now goes on from the same text."""
    gone = _tokens_gone(both)
    if gone:
        sentence = f"The older engine ends at token {gone[0]}, and the new one's manifest lacks it."
        return found(GROUP, "end_tokens", False, sentence, lost=len(gone))
    ended = [(old, new) for old, new in both.answers() if old.finish_reason != "length"]
    same = [(old, new) for old, new in ended if new.text.startswith(old.text)]
    lost = [new.name for _, new in same if new.finish_reason == "length"]
    # Between other numbers one answer may go on where it was in doubt, and not every one.
    is_lost = bool(lost) if both.relation is Relation.REBUILD else len(lost) == len(same) > 1
    if is_lost and both.same_source:
        sentence = (
            f"{len(lost)} of {len(ended)} answers that ended by themselves go on to their limit "
            f"from the same text: {lost[0]!r}; is an end token lost?"
        )
        return found(GROUP, "end_tokens", False, sentence, lost=len(lost), of=len(ended))
    sentence = f"Of {len(ended)} answers that ended by themselves {len(lost) or 'none'} goes on"
    if not both.same_source:
        return not_judged(GROUP, "end_tokens", f"{sentence}; another source may say more.")
    return found(GROUP, "end_tokens", True, f"{sentence}.", lost=len(lost), of=len(ended))


def _tokens_gone(both: Comparison) -> list[int]:
    """End tokens that only the old manifest names, of engines of one source."""
    old, new = both.old and both.old.head.manifest, both.new.head.manifest
    if not old or new is None or not both.same_source:
        return []
    return sorted(set(old.model.eos_token_ids) - set(new.model.eos_token_ids))
