"""Our CPU engine beside OpenVINO GenAI, llama.cpp and transformers, in one run: docs/cpu.md.

All take turns on the same prompts, in rounds; what is compared are medians of the rounds' ratios.
Measured: output tokens a second by load, the first token and prefill, evenness while a long prompt
arrives, memory, time to readiness, and where a step's time goes beside what the machine allows.
Peers are installed into environments of their own below --peers. How it is made: scripts/benches/.

    python scripts/bench_serving.py engines/smollm2-135m-instruct-int4_awq --rounds 5
    python scripts/bench_serving.py ENGINE --growth docs/cpu_growth.png --shape 1b
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from benches import arithmetics, goals, growth, profiles, recipes, shapes  # noqa: E402
from benches.contender import Contender, ContenderFailed, Recipe  # noqa: E402
from benches.figures import Sample  # noqa: E402
from benches.machine import Limits, measure_limits, step_work  # noqa: E402
from benches.prompts import Prompts  # noqa: E402
from benches.quiet import LIMIT, Others, Patience  # noqa: E402
from benches.turns import SMOKE, Sizes, Turns  # noqa: E402

from enginehouse.runtime.cpu.instructions import choose_instructions  # noqa: E402
from enginehouse.runtime.cpu.packed_file import PACKED, PackedFile  # noqa: E402
from enginehouse.runtime.engine import read_engine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
PEERS = ("openvino", "llama.cpp", "transformers")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path, help="built with --backend cpu from the sample model")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument(
        "--quick-rounds", type=int, default=1, help="of whom no goal is about (default 1)"
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=list(goals.LOADS))
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=arithmetics.ALL,
        default=list(arithmetics.ALL),
        help="of our kernels; the first is served through HTTP (default: int8 bf16)",
    )
    parser.add_argument("--with", nargs="*", dest="others", choices=(*PEERS, "torch"))
    parser.add_argument("--gguf", type=Path, help="the sample model, for peers")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", help="their environments")
    parser.add_argument("--out", type=Path, default=CACHE / "bench_serving")
    parser.add_argument(
        "--patience", type=float, default=90, metavar="S", help="for quiet moments, in all"
    )
    parser.add_argument(
        "--variants", action="store_true", help="the server with one thread, and by priorities"
    )
    parser.add_argument("--growth", type=Path, metavar="PNG", help="measure and draw it too")
    parser.add_argument("--shape", choices=["1b"], help="a second shape too, in each form")
    parser.add_argument("--smoke", action="store_true", help="few tokens: does all of it run?")
    parser.add_argument("--only-extras", action="store_true", help="growth and shape alone")
    return parser


class Report:
    """Sections as they come: printed, and written to a folder as Markdown and JSON."""

    def __init__(self, folder: Path) -> None:
        self.markdown, self.json = folder / "results.md", folder / "results.json"
        self._text = ""
        self._data: dict[str, Any] = {}

    def say(self, text: str) -> None:
        print(f"\n{text}\n", flush=True)
        self._text += f"{text}\n\n"
        self.markdown.write_text(self._text)

    def add(self, title: str, rows: Sequence[Sequence[str]], data: Any) -> None:
        self._data[title] = data
        self.json.write_text(json.dumps(self._data, indent=1) + "\n")
        self.say(f"## {title}\n\n{goals.markdown(rows)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    began = time.monotonic()
    for folder in (args.out, args.peers):
        folder.mkdir(parents=True, exist_ok=True)
    report = Report(args.out)
    engines = {
        name: arithmetics.engine_in(args.engine, name, CACHE / "bench_engines")
        for name in args.activations
    }
    ours, others = find_contenders(args, engines)
    with Contender(ours[0], args.out / "first.log"):
        pass  # kernels are compiled once a machine; what follows finds them
    Bench(args, engines, report).run(ours, others)
    if args.shape is not None:
        rows = list(shapes.measure_shapes(CACHE / "shapes", args.activations))
        report.add("shape 1b", shapes.shape_rows(rows), [row._asdict() for row in rows])
    report.say(f"{time.monotonic() - began:.0f} s in all; {report.markdown} and {report.json}")
    return 0


def find_contenders(
    args: argparse.Namespace, engines: Mapping[str, Path]
) -> tuple[list[Recipe], list[Recipe]]:
    """Ours, in process by arithmetic and through HTTP in the first; and the others."""
    ours = [recipes.in_process(path, name) for name, path in engines.items()]
    served, path = next(iter(engines.items()))
    ours.append(recipes.through_http(path, served))
    asked = (*PEERS, "torch") if args.others is None else args.others
    gguf = args.gguf or next(iter(sorted((CACHE / "sample").glob("*.gguf"))), None)
    others = recipes.variants(path, served) if args.variants else []
    if gguf is not None:
        others += recipes.peer_recipes(gguf, args.peers, [name for name in PEERS if name in asked])
    elif set(asked) & set(PEERS):
        print(
            "no peer takes part: the sample is not in .cache/sample; give --gguf", file=sys.stderr
        )
    if "torch" in asked:
        others.append(recipes.torch_backend(args.engine))
    return ours, others


class Bench:
    """One run over what is found: machine, starts, rounds, profile, goals, growth."""

    def __init__(
        self, args: argparse.Namespace, engines: Mapping[str, Path], report: Report
    ) -> None:
        self._args, self._report = args, report
        self._sizes = SMOKE if args.smoke else Sizes()
        self._networks = {name: PackedFile(path / PACKED).network for name, path in engines.items()}
        model = read_engine(args.engine).manifest.model.name
        self._prompts = Prompts(args.engine, model)
        patience = Patience(args.patience)
        self._turns = Turns(self._prompts, patience, args.rounds, args.quick_rounds, self._sizes)

    def run(self, ours: Sequence[Recipe], others: Sequence[Recipe]) -> None:
        limits = self._measure_machine()
        everyone = [*ours, *others]
        if not self._args.only_extras:
            self._turns.starts(everyone, self._args.out)
        with ExitStack() as stack:
            running = []
            for recipe in everyone:
                log = self._args.out / f"{recipe.name}.log"
                try:
                    running.append(stack.enter_context(Contender(recipe, log)))
                except ContenderFailed as error:
                    print(f"{error}; it is left out", file=sys.stderr)
            if not self._args.only_extras:
                self._turns.rounds(running, self._args.sequences)
                self._profile(running, limits)
                self._judge([recipe.name for recipe in ours])
            if self._args.growth is not None:
                self._grow([one for one in running if one.has_goals and one.in_process])

    def _measure_machine(self) -> Limits:
        first = next(iter(self._networks.values()))
        weight_bytes = step_work(first, 1, self._sizes.prompt).weight_bytes
        limits = measure_limits(self._args.out, os.cpu_count() or 1, weight_bytes)
        with Others() as idle:
            time.sleep(1)
        self._report.add("machine", profiles.limit_rows(limits), limits._asdict())
        self._report.say(machine_line(idle.share))
        return limits

    def _profile(self, running: Sequence[Contender], limits: Limits) -> None:
        found = profiles.measure_profiles(
            running, self._prompts, self._networks, limits, self._sizes
        )
        self._report.add("profile", profiles.profile_rows(found), [one._asdict() for one in found])
        for one in (profile for profile in found if profile.batch == goals.PROFILED):
            for part, ms in one.parts.items():
                share = Sample(100 * ms / one.step_ms, one.busy)
                self._turns.figures.add(goals.PART.format(part), one.who, share)

    def _judge(self, ours: Sequence[str]) -> None:
        figures = self._turns.figures
        verdicts = [goals.judge(goal, figures) for goal in goals.goals(ours)]
        self._report.add("figures", goals.figure_rows(figures), figures.samples)
        self._report.add("goals", goals.verdict_rows(verdicts), [v._asdict() for v in verdicts])

    def _grow(self, running: Sequence[Contender]) -> None:
        points = growth.measure_growth(running, self._prompts)
        data = [point._asdict() for point in points]
        self._report.add("growth", growth.growth_rows(points), data)
        growth.plot(points, self._args.growth, self._args.peers)


def machine_line(busy: float) -> str:
    words = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in words if line.startswith("model name")]
    noise = f"others took {busy:.0%} of it at the beginning" if busy > LIMIT else "quiet"
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, kernels for "
        f"{choose_instructions()}; {noise}. A share of others stands where it was over "
        f"{LIMIT:.0%}; the number of rounds in brackets."
    )


if __name__ == "__main__":
    sys.exit(main())
