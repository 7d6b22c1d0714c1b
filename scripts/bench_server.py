"""The HTTP layer alone, beside FastAPI and uvicorn: `python scripts/bench_server.py ENGINE`.

Both servers have one worker on one core, the load generator has the other; both read the same body
(our pydantic model), render and tokenise with the engine's template and tokenizer, and are given
tokens by the same scripted engine, which answers at once and lives in the worker: a host process
would share one of the two cores, and what it costs is the same for both (`benches/at_once.py`).
Neither writes an access log. Rounds alternate; printed are medians, and medians of the rounds'
ratios. Answers a second of CPU time are told too: a machine that others use changes them less.

Plain answers have 16 tokens, streams 64. The first text is that of a stream with 100 others open,
each at 20 tokens a second, and alone. What a stream holds of the server's resident memory is that
of 1,000 that are open, at a token a second. `trivial` is a server that does nothing: how fast the
load generator is.

`--peer ray` puts Ray Serve's ingress before our own server, in the place of FastAPI (wants the
extra `ray`): what that hop costs (docs/replicas.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benches import peers  # noqa: E402
from benches.contender import HERE, Contender, Recipe  # noqa: E402
from benches.figures import Figures, Sample, percentile  # noqa: E402
from benches.goals import markdown  # noqa: E402
from benches.quiet import Others  # noqa: E402

from enginehouse.runtime.engine import read_engine  # noqa: E402
from enginehouse.server.client.own_server import free_port  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
OURS, LIMIT = "enginehouse", "trivial"
FASTAPI, INGRESS = "fastapi", "ray"
PLAIN_TOKENS, STREAM_TOKENS = 16, 64
PLAIN, EVENTS = "plain answers/s", "SSE events/s"
PLAIN_CPU, EVENTS_CPU = "plain answers/CPU s", "SSE events/CPU s"
ALONE, FIRST, ADDED = "first text alone, ms", "first text beside 100, ms", "added beside 100, ms"
OPEN = "KiB a stream of 1000"
ROWS = (PLAIN, PLAIN_CPU, EVENTS, EVENTS_CPU, ALONE, FIRST, ADDED, OPEN)
MORE_IS_BETTER = ROWS[:4]
PACE_S = {"first": 0.05, "open": 1.0}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path, help="any engine directory: its text files are used")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load (default 3)")
    parser.add_argument("--connections", type=int, default=16, help="of each load (default 16)")
    parser.add_argument("--probes", type=int, default=100, help="streams timed (default 100)")
    parser.add_argument("--open", type=int, default=1000, help="0: none (default 1000)")
    parser.add_argument(
        "--peer",
        choices=(FASTAPI, INGRESS, "none"),
        default=FASTAPI,
        help="ray: our own server behind Ray Serve's ingress; none: ours alone, to profile it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", help="their environments")
    parser.add_argument("--out", type=Path, default=CACHE / "bench_server", help="logs, links")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("bench_server: one core; wanted two, one of them for the load", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    args.peers.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, cores)
    with Others() as others:
        bench.run()
    table = bench.rows()
    print(f"others took {others.share:.0%} of the machine; {args.rounds} rounds\n")
    print(markdown(table))
    if args.json is not None:
        data = {"others": others.share, "samples": bench.figures.samples}
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


class Bench:
    """Owns the figures; a server of each kind runs as long as it is measured."""

    def __init__(self, args: argparse.Namespace, cores: Sequence[int]) -> None:
        self.figures = Figures()
        self._args = args
        self._server_core, self._load_core = cores[0], cores[-1]
        self._model = read_engine(args.engine).manifest.model.name
        self._who = [OURS] if args.peer == "none" else [OURS, args.peer]
        self._links = _links(args.out / "links")

    def run(self) -> None:
        for pace, measure in (("first", self._loads), ("open", self._memory)):
            if pace == "open" and not self._args.open:
                continue
            with ExitStack() as stack:
                names = [*self._who, LIMIT] if pace == "first" else self._who
                running = [stack.enter_context(self._start(name, PACE_S[pace])) for name in names]
                for number in range(self._args.rounds if pace == "first" else 1):
                    for each in running[:: -1 if number % 2 else 1]:
                        measure(each)

    def _loads(self, one: Contender) -> None:
        args, load = self._args, {"connections": self._args.connections}
        kinds = [
            ("plain", PLAIN, PLAIN_CPU, PLAIN_TOKENS),
            ("stream", EVENTS, EVENTS_CPU, STREAM_TOKENS),
        ]
        for op, what, per_cpu, tokens in kinds:
            one.ask(op, seconds=0.5, tokens=tokens, **load)
            with _cpu_s(one) as spent, Others() as others:
                told = one.ask(op, seconds=args.seconds, tokens=tokens, **load)
            self._add(one, what, told["per_s"], others.share)
            self._add(one, per_cpu, told["count"] / spent[0], others.share)
        if one.name == LIMIT:
            return
        with Others() as others:
            alone = _median_ms(one.ask("probe", count=args.probes, tokens=4))
            one.ask("open", streams=100)
            beside = _median_ms(one.ask("probe", count=args.probes, tokens=4))
            one.ask("close")
        for what, ms in ((ALONE, alone), (FIRST, beside), (ADDED, beside - alone)):
            self._add(one, what, ms, others.share)

    def _memory(self, one: Contender) -> None:
        one.ask("plain", connections=16, seconds=1.0, tokens=PLAIN_TOKENS)
        before = _rss_bytes(one)
        one.ask("open", streams=self._args.open)
        told = one.ask("watch", seconds=5.0)
        if told["events"] < 4 * self._args.open:
            print(f"{one.name}: {told['events']} events in 5 s of {self._args.open} streams")
        kib = (_rss_bytes(one) - before) / self._args.open / 1024
        self._add(one, OPEN, kib, 0.0)
        one.ask("close")

    def _add(self, one: Contender, what: str, value: float, busy: float) -> None:
        self.figures.add(what, one.name, Sample(value, busy))

    def rows(self) -> list[list[str]]:
        heads = ["", *self._who, "ratio", LIMIT]
        rows = [heads]
        for what in ROWS:
            medians = [self.figures.median(what, name) for name in (*self._who, LIMIT)]
            ratio = self.figures.ratio(what, OURS, self._args.peer)
            told = ["-" if each is None else f"{each:,.1f}" for each in medians]
            told.insert(-1, "-" if ratio is None or what == ADDED else f"{ratio:.2f}")
            rows.append([what, *told])
        return rows

    def _start(self, name: str, period_s: float) -> Contender:
        port, engine = free_port(), str(self._args.engine.resolve())
        pin = ("taskset", "-c", str(self._server_core))
        load = ("taskset", "-c", str(self._load_core), sys.executable)
        load += (str(HERE / "run_http_load.py"), str(port), self._model)
        period = {"BENCH_PERIOD_S": str(period_s)}
        if name == LIMIT:
            command = (sys.executable, str(HERE / "run_trivial.py"), str(port))
            recipe = Recipe(name, (*pin, *command), {}, port, "/", load)
        elif name == FASTAPI:
            python = peers.python_of(peers.FASTAPI, self._args.peers)
            command = (str(python), "-m", "uvicorn", "run_fastapi:app", "--port", str(port))
            command += ("--no-access-log", "--log-level", "warning", "--loop", "uvloop")
            env = {**period, "ENGINE": engine, "PYTHONPATH": f"{HERE}:{self._links}"}
            recipe = Recipe(name, (*pin, *command), env, port, "/health", load)
        else:
            command = (sys.executable, "-m", "gunicorn", "benches.at_once:create_app()")
            command += ("-c", "python:enginehouse.server.launch.gunicorn_conf")
            ours = free_port() if name == INGRESS else port
            if name == INGRESS:
                proxy = str(HERE / "run_ray_ingress.py")
                command = (sys.executable, proxy, str(port), str(ours), *command)
            env = {
                **period,
                "ENGINEHOUSE_ENGINE": engine,
                "ENGINEHOUSE_BIND": f"127.0.0.1:{ours}",
                "ENGINEHOUSE_LOG_LEVEL": "warning",
                "ENGINEHOUSE_HOST_ADDRESS": f"ipc://{self._args.out}/nobody",
                "PYTHONPATH": f"{HERE.parent}:{self._links}",
            }
            recipe = Recipe(name, (*pin, *command), env, port, "/health/ready", load)
        return Contender(recipe, self._args.out / f"{name}.log")


def _links(folder: Path) -> Path:
    """The namespace, for an environment in which enginehouse is not installed."""
    home = folder / "enginehouse"
    home.mkdir(parents=True, exist_ok=True)
    for floor in ("runtime", "server"):
        link = home / floor
        if not link.is_symlink():
            link.symlink_to(ROOT / floor)
    return folder


def _processes(one: Contender) -> list[psutil.Process]:
    """The server's: the last of a contender's, and its children."""
    server = psutil.Process(one.pids[-1])
    return [server, *server.children(recursive=True)]


@contextmanager
def _cpu_s(one: Contender) -> Iterator[list[float]]:
    """Seconds of CPU that the server spends within the block, in the list at its end."""

    def used() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in _processes(one))

    spent: list[float] = []
    before = used()
    yield spent
    spent.append(max(used() - before, 0.01))


def _rss_bytes(one: Contender) -> int:
    return sum(int(each.memory_info().rss) for each in _processes(one))


def _median_ms(told: dict[str, Any]) -> float:
    return 1000 * percentile(told["seconds"], 0.5)


if __name__ == "__main__":
    sys.exit(main())
