"""Break a running server in one way after another, and say what its clients saw.

Each fault has a server of its own, `enginehouse serve` on the loopback interface, with a tiny
engine that is made on the spot or the one that is given. What must hold stands in scripts/breaks/.
Exit status 1: something did not hold. A full disk is a small one that is mounted: that wants root,
and is left out, and said so, without.

    python scripts/faults.py                       # all of them: some minutes
    python scripts/faults.py --quick --json out.json
    python scripts/faults.py --only host-killed slow-readers
    python scripts/faults.py --soak 30 --plot soak.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from benches import peers  # noqa: E402
from breaks import of_clients, of_files, of_host, of_workers, soak  # noqa: E402
from breaks.case import Case, Fault, run_case  # noqa: E402
from breaks.server import Server, wait_until  # noqa: E402
from breaks.tiny import tiny_engine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FAULTS = [*of_clients.FAULTS, *of_host.FAULTS, *of_files.FAULTS, *of_workers.FAULTS]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, help="to serve; without it a tiny one is made")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="those that take a minute together")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="mixed traffic instead")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what --soak has seen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    return parser


def run_fault(fault: Fault, engine: Path, folder: Path) -> Case:
    """From a fresh server to its end."""
    folder.mkdir()
    served, env = engine, {"ENGINEHOUSE_MODEL_NAME": "faults", **fault.env}
    env["ENGINEHOUSE_WORKERS"] = str(fault.workers)
    if fault.copy:
        served = folder / "engine"
        shutil.copytree(engine, folder / "first")
        served.symlink_to(folder / "first")
    fault.prepare(folder, env)
    log = (folder / "disk" if (folder / "disk").exists() else folder) / "log"
    server = Server(served, log, env)
    case = Case(folder, served, server)
    try:
        run_case(fault, case)
    finally:
        status = server.stop()
        shutil.copyfile(log, folder / "log.txt")
        fault.clean(folder)
    case.want(status == 0, f"it ended with status {status}")
    return case


def row_of(fault: Fault, case: Case, seconds: float, before: str) -> dict[str, Any]:
    """before: what did not hold in a first try."""
    verdict = "held" + (f" the second time; first: {before}" if before else "")
    if case.failures:
        verdict = f"FAILED: {'; '.join(case.failures)}"
    return {
        "fault": fault.name,
        "clients saw": case.saw or "-",
        "recovered in": "-" if case.recovery_s is None else f"{case.recovery_s:.1f} s",
        "verdict": verdict,
        "seconds": round(seconds, 1),
    }


def run_soak(
    minutes: float, engine: Path, folder: Path, image: Path | None
) -> list[dict[str, Any]]:
    """A row for each figure, with its verdict."""
    python = peers.python_of(peers.PLOT, ROOT / ".cache" / "peers") if image else None
    seen = Counter[str]()
    counts = folder / "counts"
    counts.mkdir(parents=True)
    env = {"ENGINEHOUSE_MODEL_NAME": "faults", "BREAK_COUNTS": str(counts)}
    server = Server(engine, folder / "log.txt", {**env, "ENGINEHOUSE_WORKERS": "2"})
    try:
        wait_until(server.is_ready, "ready")
        samples = soak.soak(server, counts, minutes, seen)
    finally:
        server.stop()
    for what, count in sorted(seen.items()):
        print(f"{what} x{count}")
    if image is not None and python is not None:
        soak.plot(samples, image, python)
    return soak.rows_of(soak.judge(samples))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown has it."""
    head = list(rows[0])
    cells = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    args = make_parser().parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if (fault.name in args.only if args.only else fault.quick or not args.quick)
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        engine = args.engine.resolve() if args.engine else tiny_engine(root / "tiny")
        if args.soak:
            rows, chosen = run_soak(args.soak, engine, root / "soak", args.plot), []
        for fault in chosen:
            if lacks := fault.lacks():
                print(f"{fault.name}: left out, as this machine lacks {lacks}", flush=True)
                continue
            began_s = time.monotonic()
            case, before = run_fault(fault, engine, root / fault.name), ""
            if case.failures:  # the machine may have stood still: once more, and both are told
                before = "; ".join(case.failures)
                print(f"{fault.name}: {before}; once more", flush=True)
                (root / fault.name).rename(root / f"{fault.name}.first")
                case = run_fault(fault, engine, root / fault.name)
            rows.append(row_of(fault, case, time.monotonic() - began_s, before))
            print(f"{fault.name}: {json.dumps(rows[-1])}", flush=True)
            if args.logs:
                args.logs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / fault.name / "log.txt", args.logs / f"{fault.name}.log")
    if rows:
        print(f"\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(not row["verdict"].startswith("held") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
