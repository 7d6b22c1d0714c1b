"""One plan, compiled in a process of its own, whose peak memory is then the plan's.

Reads a job as one line of JSON and writes what happens as lines of JSON: steps done, then the
result or the error. Ends when its standard input does, so that it does not outlive who started it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from enginehouse.build.tensorrt.compile import PlanLimits, compile_plan
from enginehouse.build.tensorrt.compiler import load_compiler
from enginehouse.build.tensorrt.network import NetworkPart
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError, EnginehouseError, PlanError
from enginehouse.runtime.tensorrt.inputs import RotaryInputs, bound_weights

# The compiler's outermost phases and how often each reports: once, and once a profile.
_PHASES = {"Building engine": 6, "Computing profile costs": 10}
STEPS = sum(_PHASES.values())


class Job(NamedTuple):
    """What becomes the file `output`. config: `ModelConfig.to_dict()`; rank: whose weights the
    plan holds, from its file beside `output`; None for none.
    """

    package: str
    config: dict[str, Any]
    sms: tuple[int, ...]
    limits: PlanLimits
    part: NetworkPart
    output: str
    rank: int | None = None

    @classmethod
    def from_json(cls, line: bytes) -> Job:
        job = cls(*json.loads(line))
        return job._replace(limits=PlanLimits(*job.limits), part=NetworkPart(*job.part))


def run_job(job: Job, advance: Any) -> dict[str, Any]:
    """Compile, in this process, and write the file: its bytes and the costs of `CompiledPlan`.

    advance(count): of STEPS, in all.
    """
    trt = load_compiler(job.package)
    config = ModelConfig.from_dict(job.config)
    left = dict(_PHASES)

    def step(phase: str, _done: int, _of: int) -> None:
        if left.get(phase, 0):
            left[phase] -= 1
            advance(1)

    constants = None
    if job.rank is not None:
        folder, positions = Path(job.output).parent, job.limits.max_positions
        constants = rank_constants(config, folder, job.rank, job.part, positions)
    compiled = compile_plan(trt, config, job.sms, job.limits, step, job.part, constants)
    try:
        Path(job.output).write_bytes(compiled.plan)
    except OSError as error:
        raise EngineError(
            f"{job.output} cannot be written: {error.strerror}; make room for it, or choose "
            "another output folder"
        ) from None
    advance(sum(left.values()))
    return {
        "bytes": len(compiled.plan),
        "seconds": round(compiled.seconds, 1),
        "peak_memory_bytes": compiled.peak_memory_bytes,
        "scratch_bytes": compiled.scratch_bytes,
    }


def rank_constants(
    config: ModelConfig, folder: Path, rank: int, part: NetworkPart, max_positions: int
) -> dict[str, Tensor]:
    """The weights of a part of the decoder, by the rank file's names, and the rotary tables."""
    with safe_open(folder / f"rank{rank}.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if part.holds(name)]
        tensors = {name: file.get_tensor(name) for name in names}
    return bound_weights(config, tensors, rank) | RotaryInputs(config, max_positions).tables


def main() -> int:
    """Exit status 1 after an error, which is said."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            return 1
        line += more
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        say(result=run_job(Job.from_json(line), lambda count: say(steps=count)))
    except EnginehouseError as error:
        say(error=str(error), refused=isinstance(error, PlanError))
        return 1
    return 0


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
