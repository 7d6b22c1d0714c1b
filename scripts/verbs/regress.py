"""`enginehouse regress`: is an engine still what it was? Records one, judges one against another.

What is asked and judged is the regression floor's; this file reads flags, shows progress and writes
what was found. Exit status: 0 passed, 1 regressed, 2 could not run, 3 cannot tell.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from enginehouse.runtime.errors import EnginehouseError
from enginehouse.verbs.base import VerbParser

if TYPE_CHECKING:  # numpy, which --help does without
    from enginehouse.regress.run import Plan
    from enginehouse.runtime.engine import Manifest

_GROUPS = ("numerics", "quality", "behaviour", "speed")
_LINE_S = 10.0
_TAKES = {"record": 1, "run": 1, "explain": 2}
_OF_RUN = ("baseline", "reference", "cannot_tell", "baseline_model", "baseline_api_key")
_OF_ASKING = ("out", "only", "suite", "limits", "model", "api_key")


def make_parser() -> VerbParser:
    parser = VerbParser(
        "regress",
        "record|run ENGINE-or-URL [flags] | explain OLD NEW",
        "Is an engine still as good, does it still behave, is it still as fast? record keeps what "
        "one answers; run judges one, against a recording or another engine, which takes turns "
        "with it; explain says what differs between two builds. Exit status: 0 passed, "
        "1 regressed, 2 could not run, 3 cannot tell.",
        "enginehouse regress run engines/new --baseline engines/old --out report",
        "enginehouse regress record engines/mine -o baseline",
        "enginehouse regress explain engines/old engines/new",
    )
    parser.add_argument("what", metavar="record|run|explain", help="what to do")
    parser.add_argument(
        "targets",
        metavar="ENGINE-or-URL",
        nargs="*",
        help="an engine directory, or http://host:port; explain takes two directories",
    )
    parser.add_argument(
        "--baseline", metavar="OLD", help="a recording, an engine directory or a URL"
    )
    parser.add_argument(
        "--reference", metavar="HF", help="the source checkpoint: judge by it in float32 too"
    )
    parser.add_argument(
        "-o", "--out", metavar="DIR", type=Path, help="where the recording or the reports go"
    )
    parser.add_argument(
        "--only", nargs="+", choices=_GROUPS, metavar="GROUP", help=f"of {', '.join(_GROUPS)}"
    )
    parser.add_argument(
        "--suite", metavar="FILE", type=Path, help="what is asked; else the default"
    )
    parser.add_argument("--limits", metavar="FILE", type=Path, help="how much may differ")
    parser.add_argument(
        "--cannot-tell", choices=("pass", "fail"), help="exit with 0 or 1 instead of 3"
    )
    parser.add_argument("--model", help="of a URL; default: the first of /v1/models")
    parser.add_argument("--baseline-model", metavar="MODEL", help="the same of --baseline's URL")
    parser.add_argument(
        "--api-key", metavar="KEY", help="of a URL; default: ENGINEHOUSE_API_KEY, OPENAI_API_KEY"
    )
    parser.add_argument(
        "--baseline-api-key", metavar="KEY", help="of --baseline's URL; default: the same"
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.what not in _TAKES:
        parser.error(f"{args.what!r} is none of {', '.join(_TAKES)}")
    if len(args.targets) != _TAKES[args.what]:
        parser.error(
            f"{args.what} takes {_TAKES[args.what]} of engine or URL, not {len(args.targets)}"
        )
    useless = {"run": (), "record": _OF_RUN, "explain": (*_OF_RUN, *_OF_ASKING)}[args.what]
    for name in useless:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of no use to {args.what}; leave it out")
    if args.what == "explain":
        return _explain(*map(Path, args.targets))
    if args.what == "record" and args.out is None:
        parser.error("record wants --out DIR, the folder that it is kept in")
    if args.what == "run" and args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; wanted a folder")
    return _record(args) if args.what == "record" else _run(args)


def _explain(old_path: Path, new_path: Path) -> int:
    from enginehouse.regress.explain import explain, relation_of

    old, new = _manifest(old_path), _manifest(new_path)
    relation = relation_of(old, new).value.replace("_", " ")
    print(f"{old_path}, of {old.created} -> {new_path}, of {new.created}: {relation}")
    for sentence in explain(old, new):
        print(f"- {sentence}")
    return 0


def _manifest(path: Path) -> Manifest:
    """Of an engine directory, or of the engine that a recording is of."""
    from enginehouse.regress.recording import is_recording, read_recording
    from enginehouse.runtime.engine import read_manifest

    if not is_recording(path):
        return read_manifest(path)
    manifest = read_recording(path).head.manifest
    if manifest is None:
        raise EnginehouseError(f"{path} is a recording of a server, whose build is not known")
    return manifest


def _record(args: argparse.Namespace) -> int:
    from enginehouse.regress.recording import check_place, write_recording
    from enginehouse.regress.run import record

    plan = _plan(args)
    check_place(args.out)
    with _progress() as say:
        recording = record(plan, say)
    write_recording(recording, args.out)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out} ({size / 1024:.0f} KiB)")
    return 0


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from enginehouse.regress.report.files import write_reports
    from enginehouse.regress.report.terminal import print_outcome
    from enginehouse.regress.run import run

    plan = _plan(args)
    with _progress() as say:
        outcome = run(plan, say)
    print_outcome(outcome, Console(highlight=False))
    if args.out is not None:
        for path in write_reports(outcome, args.out, cannot_tell=args.cannot_tell):
            print(path)
    return outcome.verdict.exit_status(cannot_tell=args.cannot_tell)


def _plan(args: argparse.Namespace) -> Plan:
    from enginehouse.regress.limits import load_limits
    from enginehouse.regress.run import Plan
    from enginehouse.regress.suite.reading import load_suite

    env = os.environ
    plan = Plan(
        new=args.targets[0],
        baseline=args.baseline,
        suite=load_suite(args.suite),
        limits=load_limits(args.limits),
        reference=args.reference,
        groups=args.only or _GROUPS,
        model=args.model,
        baseline_model=args.baseline_model,
        baseline_api_key=args.baseline_api_key,
        api_key=args.api_key or env.get("ENGINEHOUSE_API_KEY") or env.get("OPENAI_API_KEY"),
    )
    print(plan.cost, file=sys.stderr, flush=True)
    return plan


@contextmanager
def _progress() -> Generator[Callable[[str], None], None, None]:
    """A line that changes on a terminal; elsewhere one every ten seconds."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda line: status.update(escape(line))
        return
    began = said = time.monotonic()

    def say(line: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _LINE_S:
            said = now
            print(f"{now - began:.0f} s: {line}", file=sys.stderr, flush=True)

    yield say
