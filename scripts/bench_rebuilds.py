"""False alarms of `enginehouse regress`: the same engine built again and again, and judged.

    python scripts/bench_rebuilds.py [MODEL] [--count 20] [--quant int4] [--limits FILE]

The first build is the baseline. Each other one is built into a new folder and judged beside it, as
CI would; in every second one a neighbour takes a whole core meanwhile. All of them are clean: one
that regressed is a false alarm, and the exit status 1. What could not be told is counted too.
Figures: docs/regress.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEIGHBOUR = "while True: sum(range(10 ** 6))"
_PROGRAM = [sys.executable, "-m", "enginehouse.verbs.main"]
_LIMIT_S = 3600


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="default: the sample")
    parser.add_argument("--count", type=int, default=20, help="of rebuilds (default 20)")
    parser.add_argument("--quant", default="int4", help="(default int4)")
    parser.add_argument("--backend", default="cpu", help="(default cpu)")
    parser.add_argument("--limits", type=Path, help="of regress run")
    args = parser.parse_args(argv)
    alarms, unsure = 0, Counter[str]()
    with tempfile.TemporaryDirectory(prefix="rebuilds-") as name:
        folder = Path(name)
        baseline = build(args, folder / "baseline")
        for number in range(1, args.count + 1):
            busy = number % 2 == 0
            with neighbour(busy):
                new = build(args, folder / f"rebuild-{number}")
                began = time.monotonic()
                outcome = judge(args, new, baseline, folder / "report")
                seconds = time.monotonic() - began
            alarms += outcome["verdict"] == "regressed"
            unsure.update(names(outcome, "cannot_tell"))
            print(said(number, busy, outcome, seconds, digest(new) == digest(baseline)), flush=True)
            shutil.rmtree(new)
    told = ", ".join(f"{check} {count}" for check, count in unsure.most_common())
    print(f"{args.count} clean rebuilds: {alarms} false alarms; could not tell {told or 'none'}")
    return 1 if alarms else 0


def build(args: argparse.Namespace, output: Path) -> Path:
    command = [*_PROGRAM, "build", *([args.model] if args.model else []), "-o", str(output)]
    command += ["--quant", args.quant, "--backend", args.backend, "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_LIMIT_S)
    return output


def judge(args: argparse.Namespace, new: Path, old: Path, report: Path) -> dict[str, Any]:
    """What report.json says; a run that could not be ends all."""
    command = [*_PROGRAM, "regress", "run", str(new), "--baseline", str(old), "--out", str(report)]
    command += ["--limits", str(args.limits)] if args.limits else []
    shutil.rmtree(report, ignore_errors=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    if not report.exists():
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads((report / "report.json").read_text())
    return found


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that takes a core, as long as the block lasts."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def digest(engine: Path) -> str:
    return str(json.loads((engine / "manifest.json").read_text())["digest"])


def said(number: int, busy: bool, outcome: dict[str, Any], seconds: float, same: bool) -> str:
    passed, unsure, worse = (
        names(outcome, status) for status in ("passed", "cannot_tell", "regressed")
    )
    files = "the same" if same else "others"
    return (
        f"{number:2d} {'busy ' if busy else 'quiet'} {outcome['verdict']:<11} {seconds:4.0f} s; "
        f"passed {len(passed)}, cannot tell {len(unsure)}, regressed {len(worse)}; the files are "
        f"{files}; {' '.join(worse + unsure)}"
    )


def names(outcome: dict[str, Any], status: str) -> list[str]:
    return [found["check"] for found in outcome["findings"] if found["status"] == status]


if __name__ == "__main__":
    sys.exit(main())
