"""A tiny engine of random weights that answers for as long as it is asked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from enginehouse.runtime.cpu.compiler import has_compiler

_MAKER = Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
_LIMIT_S = 300


def tiny_engine(folder: Path) -> Path:
    """Built as the command line builds: for the compiled backend, where there is a compiler."""
    folder.mkdir(parents=True)
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    subprocess.run([sys.executable, _MAKER, checkpoint], check=True, timeout=_LIMIT_S)
    script = Path(sys.executable).with_name("enginehouse-build")
    flags = ["--backend", "cpu" if has_compiler() else "torch", "--max-batch-size", "8"]
    command = [script, checkpoint, "-o", engine, "--quant", "int8", *flags]
    subprocess.run(command, check=True, timeout=_LIMIT_S, stdout=subprocess.DEVNULL)
    return engine
