"""Points of growth.py on standard input -> a PNG: `run_plot.py FILE`, with matplotlib alone."""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


def main() -> None:
    points = json.load(sys.stdin)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    short = min(point["context"] for point in points)
    for name in dict.fromkeys(point["who"] for point in points):
        own = [point for point in points if point["who"] == name]
        by_batch = sorted((p["batch"], p["step_ms"]) for p in own if p["context"] == short)
        left.plot(*zip(*((b, 1e3 * b / ms) for b, ms in by_batch), strict=True), "o-", label=name)
        for batch in sorted({p["batch"] for p in own if p["context"] > short}):
            by_context = sorted((p["context"], p["step_ms"]) for p in own if p["batch"] == batch)
            label = f"{name}, {batch} at once"
            right.plot(*zip(*by_context, strict=True), "o-", label=label)
    left.set(xscale="log", xlabel=f"sequences at once, context {short}", ylabel="tokens/s")
    right.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms a step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_xticks(sorted({p["batch" if axes is left else "context"] for p in points}))
        axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.minorticks_off()
    right.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
