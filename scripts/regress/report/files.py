"""An outcome -> the four files that CI keeps, each whole or not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from enginehouse.build.report.words import write_whole
from enginehouse.regress.outcome import Outcome
from enginehouse.regress.report.junit import junit_xml
from enginehouse.regress.report.markdown import markdown
from enginehouse.regress.report.page import page
from enginehouse.runtime.errors import EnginehouseError


def write_reports(outcome: Outcome, folder: Path, *, cannot_tell: str | None = None) -> list[Path]:
    """junit.xml, report.md, report.html and report.json in `folder`, which is made where it is not.

    cannot_tell: what that counts as, `pass` or `fail`, as in Verdict.exit_status. Raises
    EnginehouseError for a curve with what is no finite number, which JSON cannot hold; the other
    three are then written.
    """
    forms: dict[str, Callable[[], bytes]] = {
        "junit.xml": lambda: junit_xml(outcome, cannot_tell=cannot_tell),
        "report.md": lambda: markdown(outcome).encode(),
        "report.html": lambda: page(outcome).encode(),
        "report.json": lambda: report_json(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [write_whole(folder / name, form()) for name, form in forms.items()]


def report_json(outcome: Outcome) -> bytes:
    """Indented, Outcome's fields in their order; `msgspec.json.decode(..., type=Outcome)` reads it.

    What JSON cannot hold is written as what it can: a lone surrogate as U+FFFD, a figure that is no
    finite number as `inf`, `-inf` or `nan`. Raises EnginehouseError for such a number elsewhere.
    """
    stored = _storable(msgspec.to_builtins(outcome))
    for finding in stored["findings"]:
        finding["figures"] = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in finding["figures"].items()
        }
    for place, value in _floats(stored, "outcome"):
        if not math.isfinite(value):
            raise EnginehouseError(
                f"report.json: {place} is {value}, and JSON holds finite numbers only; leave it "
                "out of the curve, and say so in a finding"
            )
    return msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n"


def _storable(value: Any) -> Any:
    """With strings that UTF-8 can write."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value


def _floats(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Every float, and where it is: `outcome.divergence[0].kl[7]`."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _floats(item, f"{place}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _floats(item, f"{place}.{key}")
