"""Does the new engine solve what the old one solved? Knows no server."""

from __future__ import annotations

from collections.abc import Iterator

from enginehouse.regress.findings import Finding
from enginehouse.regress.judge.comparison import Comparison, found, not_judged
from enginehouse.regress.numerics.mcnemar import compare_solved, least_loss_seen

GROUP = "quality"


def judge_tasks(both: Comparison) -> Iterator[Finding]:
    new = {solved.name: solved.right for solved in both.new.solved}
    if not new:
        if both.old is not None and both.old.solved and both.same_server:
            why = both.new.head.left_out.get("tasks", "it was not asked")
            yield found(
                GROUP, "tasks", False, f"The old engine takes tasks, the new one not: {why}."
            )
        return
    right = sum(new.values())
    if both.old is None:
        yield not_judged(GROUP, "tasks", f"{right} of {len(new)} tasks are solved.", right=right)
        return
    shared = [solved for solved in both.old.solved if solved.name in new]
    if not shared:
        why = "The baseline has no tasks"
        yield not_judged(GROUP, "tasks", f"{why}; {right} are solved.", right=right)
        return
    old_right = sum(solved.right for solved in shared)
    limit = both.limits.task_p
    if old_right < least_loss_seen(limit):
        told = (
            f"{right} of {len(new)} tasks are solved, and too few were by the old engine to see a"
        )
        yield not_judged(GROUP, "tasks", f"{told} loss: {old_right}.", right=right, old=old_right)
        return
    lost, gained, p = compare_solved(
        [solved.right for solved in shared], [new[solved.name] for solved in shared]
    )
    sentence = (
        f"{right} of {len(new)} tasks are solved, {old_right} by the old engine: {lost} lost, "
        f"{gained} gained; so many are lost by chance with p = {p:.3g} (McNemar), wanted at least "
        f"{limit:g}. "
        f"{least_loss_seen(limit)} lost and none gained would be seen."
    )
    yield found(
        GROUP,
        "tasks",
        p >= limit,
        sentence,
        right=right,
        old=old_right,
        lost=lost,
        gained=gained,
        p=p,
    )
