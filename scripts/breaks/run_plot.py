"""Samples of soak.py on standard input -> a PNG: `run_plot.py FILE`, with matplotlib alone."""

from __future__ import annotations

import json
import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

KINDS = ("MiB", "descriptors", "greenlets", "blocks held")


def main() -> None:
    samples = json.load(sys.stdin)
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure, places = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    for kind, axes in zip(KINDS, places.flat, strict=True):
        for name in (name for name in samples[0] if name.endswith(kind)):
            label = name.removesuffix(kind).strip() or kind
            axes.plot(minutes, [sample[name] for sample in samples], label=label)
        axes.set(ylabel=kind, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in places[1]:
        axes.set_xlabel("minutes")
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
