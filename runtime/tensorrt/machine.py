"""Can this machine run an engine of TensorRT plans? Refused in one sentence before anything loads.

Each refusal says what was found, what was wanted and what to do. Imports neither torch nor CUDA;
the package is imported last, when all else fits.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.gpus import Gpu, visible_gpus
from enginehouse.runtime.tensorrt.manifest import Built, read_built
from enginehouse.runtime.tensorrt.package import PACKAGES, RTX_SMS, find_package

_ELSEWHERE = "to run and verify the model on a CPU, build it with --backend torch"
# Of nvinfer1::EngineInvalidityDiagnostics, by name: what is wrong, and what to do.
_INVALID = {
    "VERSION_MISMATCH": "was compiled by another version of it; build the engine again",
    "UNSUPPORTED_CC": "was not compiled for this GPU; build it with --sm for this one",
    "OLD_CUDA_DRIVER": "needs a newer NVIDIA driver; install one",
    "OLD_CUDA_RUNTIME": "needs a newer CUDA runtime; install one",
    "INSUFFICIENT_GPU_MEMORY": "needs more GPU memory than there is; free some, or use more ranks",
    "MALFORMED_ENGINE": "is no plan, or a damaged one; build the engine again",
    "CUDA_ERROR": "cannot be judged, as CUDA fails; see what nvidia-smi says",
}


def check_gpus(engine: Engine, built: Built, gpus: list[Gpu], num_local: int | None = None) -> None:
    """EngineError when these GPUs cannot run the plans: none, too few, or of another SM.

    num_local: ranks of this machine, None: all.
    """
    targets = " or ".join(f"SM{sm}" for sm in built.targets)
    ranks = engine.config.mapping.world_size if num_local is None else num_local
    if not gpus:
        raise EngineError(
            f"{engine.path} holds TensorRT plans, which need a GPU with {targets} and NVIDIA's "
            f"driver, and nvidia-smi shows none here; {_ELSEWHERE}"
        )
    if len(gpus) < ranks:
        raise EngineError(
            f"{engine.path} was cut for {ranks} GPUs and {len(gpus)} are visible; show it more "
            f"(CUDA_VISIBLE_DEVICES), or build it with --tp {len(gpus)}"
        )
    for gpu in gpus[:ranks]:
        if gpu.sm in built.targets:
            continue
        found = f"{gpu.name} (SM{gpu.sm})"
        if built.package == "tensorrt_rtx" and gpu.sm not in RTX_SMS:
            raise EngineError(
                f"{engine.path} holds plans of TensorRT-RTX for {targets}, and TensorRT-RTX has no "
                f"target for {found}; build it with --backend tensorrt_llm for this GPU"
            )
        raise EngineError(
            f"{engine.path} holds plans for {targets} and GPU {gpu.number} is {found}; build it "
            f"with --sm {gpu.sm}, or show it another GPU"
        )


def find_matching(engine: Engine, built: Built) -> ModuleType:
    """The package in the very version that compiled the plans; EngineError without it."""
    package = PACKAGES[built.package]
    trt = find_package(built.package)
    if trt is None:
        raise EngineError(
            f"{engine.path} holds plans of {package.title} {built.version}, which is not "
            f"installed; {package.install}"
        )
    if str(trt.__version__) != built.version:
        raise EngineError(
            f"{engine.path} holds plans of {package.title} {built.version} and "
            f"{trt.__version__} is installed, which runs only its own; install {built.version} or "
            "build the engine again"
        )
    return trt


def check_machine(engine: Engine, num_local: int | None = None) -> tuple[Built, ModuleType]:
    """What runs the engine here, or so many of its ranks. Raises EngineError when nothing does."""
    built = read_built(engine)
    check_gpus(engine, built, visible_gpus(), num_local)
    return built, find_matching(engine, built)


def check_plan(trt: Any, runtime: Any, path: Path) -> None:
    """Ask TensorRT, from the plan's first bytes, whether it would load; EngineError if not."""
    with path.open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, bits = runtime.get_engine_validity(header)
    if validity == trt.EngineValidity.INVALID:
        names = trt.EngineInvalidityDiagnostics.__members__
        said = [words for name, words in _INVALID.items() if bits & int(names[name].value)]
        raise EngineError(f"TensorRT says that {path} {said[0] if said else 'is not valid'}")
