"""How long constraints with bounded strings take, from the request to the compiled grammar.

Usage: python scripts/bench_grammars.py ENGINE [SIZES]. ENGINE: a folder with a byte-level
tokenizer.json. Vocabularies that are larger than its own are filled up with pieces of its words.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from enginehouse.runtime.errors import RequestError
from enginehouse.runtime.grammar.compiler import GrammarCompiler
from enginehouse.runtime.request import Constraint, ConstraintKind


def fields(*bounds: int) -> str:
    """A schema of strings, each with its longest length."""
    properties = {f"p{i}": {"type": "string", "maxLength": n} for i, n in enumerate(bounds)}
    return json.dumps({"type": "object", "properties": properties, "required": list(properties)})


CONSTRAINTS = {
    "a string, 100": (ConstraintKind.JSON_SCHEMA, fields(100)),
    "two, 100 and 500": (ConstraintKind.JSON_SCHEMA, fields(100, 500)),
    "ten, 10,000": (ConstraintKind.JSON_SCHEMA, fields(*range(10_000, 9_990, -1))),
    "regex, {1,100} and {1,500}": (ConstraintKind.REGEX, "^Title: .{1,100}\\nBody: .{1,500}$"),
    "no bound": (ConstraintKind.JSON_SCHEMA, '{"type": "object"}'),
}


def write_vocabulary(source: Path, size: int, dest: Path) -> None:
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    words = dict(data["model"]["vocab"])
    own, choose = [word for word in words if len(word) > 1], random.Random(0)
    while len(words) < size:
        word = choose.choice(own) + choose.choice(own)
        words.setdefault(word[: choose.randint(3, 12)], len(words))
    data["model"]["vocab"] = words
    (dest / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def measure(folder: Path, size: int) -> None:
    grammars = GrammarCompiler(folder, size, (0,))
    try:
        grammars.compile(Constraint(ConstraintKind.REGEX, "warm")).result()
        for name, (kind, value) in CONSTRAINTS.items():
            began_s = time.monotonic()
            try:
                compiled = grammars.compile(Constraint(kind, value)).result()
                kib = f"{compiled.memory_size_bytes >> 10} KiB"
            except RequestError as error:
                kib = error.message
            print(f"{size}  {name:28} {time.monotonic() - began_s:6.2f} s  {kib}", flush=True)
    finally:
        grammars.close()


def main() -> None:
    source = Path(sys.argv[1])
    for size in map(int, sys.argv[2:] or ["49152", "131072"]):
        with tempfile.TemporaryDirectory() as folder:
            write_vocabulary(source, size, Path(folder))
            measure(Path(folder), size)


if __name__ == "__main__":
    main()
