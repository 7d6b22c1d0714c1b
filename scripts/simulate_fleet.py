"""A fleet of replicas on paper: `python scripts/simulate_fleet.py --replicas 1 2 4`.

Simulated are batches with their queues and prefix caches, by a step's measured times, under
conversations that arrive evenly or in bursts, behind the routers that the server has
(server/replicas/prefix_router.py), with replicas that die and come back. Not simulated: the
network, the front's own time (docs/scale.md adds it up), a KV cache that is full of running
sequences, preemption, and replicas that are slow rather than dead.

    enginehouse bench http://127.0.0.1:8000 --clients 1 2 4 8 16 --json bench.json
    python scripts/simulate_fleet.py --bench bench.json --prefill 4000 --replicas 4 --rate 0.2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from benches.goals import markdown  # noqa: E402
from fleet.fleet import Fleet, FleetSettings, Router, Source  # noqa: E402
from fleet.outcome import Outcome  # noqa: E402
from fleet.recorded import RecordedSource  # noqa: E402
from fleet.service import ServiceTimes, read_steps  # noqa: E402
from fleet.workload import DrawnSource, Workload  # noqa: E402

from enginehouse.server.replicas.prefix_router import (  # noqa: E402
    LeastLoaded,
    PrefixRouter,
    RoundRobin,
)

POLICIES: dict[str, Callable[[], Router]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "prefix": PrefixRouter,
}
WORKLOAD = (
    *("arrivals", "bursts", "burst_s", "turns", "systems", "system_tokens", "user_tokens"),
    *("answer_tokens", "think_s", "clients", "num_conversations"),
)
HEADS = ("replicas", "policy", "requests", "tokens/s", "TTFT p50 ms", "p99 ms", "hit rate %")
MORE_HEADS = ("errors", "retried", "busiest")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--replicas", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="POLICY")
    engine = parser.add_argument_group("one replica")
    engine.add_argument("--bench", type=Path, metavar="FILE", help="of `enginehouse bench --json`")
    engine.add_argument(
        *("--step-ms",),
        nargs="+",
        metavar="BATCH=MS",
        default=["1=10", "16=20", "64=40"],
        help="instead: a step by its sequences (default 1=10 16=20 64=40)",
    )
    flags: list[tuple[str, type, Any, str]] = [
        ("--prefill", float, 10_000.0, "prompt tokens a second"),
        ("--slots", int, 64, "sequences at once"),
        ("--chunk", int, 512, "prompt tokens of a step"),
        ("--cache-blocks", int, 4096, "kept of prompts and answers"),
        ("--block-tokens", int, 64, "of each"),
        ("--jitter", float, 0.0, "of what a step takes: the deviation of its logarithm"),
    ]
    _add_all(engine, flags)
    load = parser.add_argument_group("who asks")
    load.add_argument("--trace", type=Path, metavar="FILE", help="recorded: see fleet/recorded.py")
    load.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    flags = [
        ("--speed", float, 1.0, "times faster than a trace was recorded"),
        ("--rate", float, 1.0, "conversations a second and replica that begin"),
        ("--bursts", float, 5.0, "times the mean rate, in bursts"),
        ("--burst-s", float, 5.0, "seconds of one, on average"),
        ("--turns", float, 5.0, "of a conversation, on average"),
        ("--systems", int, 8, "system prompts there are; 0: none is shared"),
        ("--system-tokens", int, 512, "of each"),
        ("--user-tokens", float, 96.0, "of a turn, on average"),
        ("--answer-tokens", float, 128.0, "on average"),
        ("--think-s", float, 10.0, "between an answer and the next turn, on average"),
        ("--clients", int, 0, "who each lead conversations one after another; 0: see --rate"),
        ("--num-conversations", int, 3, "of each client"),
    ]
    _add_all(load, flags)
    fleet = parser.add_argument_group("the fleet")
    flags = [
        ("--seconds", float, None, "simulated (default 600, or all of a trace)"),
        ("--warm-s", float, 60.0, "of them not counted"),
        ("--fronts", int, 1, "with a router each"),
        ("--stale-s", float, 0.0, "how old a front's loads may be"),
        ("--mtbf-s", float, None, "of a replica, on average; without it none fails"),
        ("--mttr-s", float, 30.0, "until it is back"),
        ("--seed", int, 0, "of all that is drawn"),
    ]
    _add_all(fleet, flags)
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser


def _add_all(group: Any, flags: Sequence[tuple[str, type, Any, str]]) -> None:
    for flag, kind, default, text in flags:
        said = text if default is None else f"{text} (default {default:g})"
        group.add_argument(flag, type=kind, default=default, metavar="N", help=said)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        times, settings = _times(args), _settings(args)
        runs = [
            (count, policy, _run(args, times, settings | {"num_replicas": count}, policy))
            for count in args.replicas
            for policy in args.policies
        ]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(markdown([(*HEADS, *MORE_HEADS), *(_row(*run) for run in runs)]))
    if args.json is not None:
        told = [{"replicas": n, "policy": name, **out._asdict()} for n, name, out in runs]
        data = {"settings": {k: str(v) for k, v in vars(args).items()}, "runs": told}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def _times(args: argparse.Namespace) -> ServiceTimes:
    if args.bench is not None:
        steps = read_steps(args.bench)
    else:
        pairs = (text.partition("=") for text in args.step_ms)
        steps = {int(batch): float(ms) / 1000 for batch, _, ms in pairs}
    names = ("slots", "chunk", "cache_blocks", "block_tokens", "jitter")
    return ServiceTimes(steps, args.prefill, **{name: getattr(args, name) for name in names})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("seconds", "warm_s", "fronts", "stale_s", "mtbf_s", "mttr_s", "seed")
    return {name: getattr(args, name) for name in names}


def _run(
    args: argparse.Namespace, times: ServiceTimes, settings: dict[str, Any], policy: str
) -> Outcome:
    source: Source
    if args.trace is not None:
        source = RecordedSource(args.trace, args.speed)
        settings = {**settings, "seconds": settings["seconds"] or source.seconds + 1.0}
    else:
        of_all = args.rate * settings["num_replicas"]
        workload = Workload(of_all, **{name: getattr(args, name) for name in WORKLOAD})
        source = DrawnSource(workload, settings["seed"])
        settings = {**settings, "seconds": settings["seconds"] or 600.0}
    return Fleet(FleetSettings(**settings), times, source, POLICIES[policy]).run()


def _row(count: int, policy: str, out: Outcome) -> tuple[str, ...]:
    return (
        *(str(count), policy, str(out.requests), f"{out.tokens_per_s:.0f}"),
        *(f"{1000 * out.ttft_p50_s:.0f}", f"{1000 * out.ttft_p99_s:.0f}"),
        *(f"{100 * out.hit_rate:.1f}", str(out.errors), str(out.retries), f"{out.busiest:.2f}"),
    )


if __name__ == "__main__":
    raise SystemExit(main())
