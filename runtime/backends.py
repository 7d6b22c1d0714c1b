"""The front door of the ground floor: an engine directory is opened by the backend it is for.

Knows which backend opens what, and nothing of any of them until one is wanted.
"""

from __future__ import annotations

from pathlib import Path

from enginehouse.runtime.engine import (
    is_hf_checkpoint,
    read_engine,
    read_manifest,
    verify_files,
)
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.executor import (
    Executor,
    ExecutorOptions,
    check_speculation,
    no_prefill_ms,
)


def open_executor(engine_dir: Path | str, options: ExecutorOptions | None = None) -> Executor:
    """Verify an engine's files against its manifest and load it.

    Raises EngineError when the directory is damaged, or its backend cannot run here.
    """
    path, options = Path(engine_dir), options or ExecutorOptions()
    manifest = read_manifest(path)
    if options.prefill_ms is not None and manifest.backend.startswith("tensorrt"):
        raise EngineError(no_prefill_ms(f"backend={manifest.backend}"))
    if options.remote_ranks is not None and manifest.backend != "tensorrt":
        raise EngineError(
            f"ranks of other machines are of backend=tensorrt, and {path} is of "
            f"{manifest.backend}; leave --ranks-address out"
        )
    check_speculation(options, manifest.backend)
    if manifest.backend == "tensorrt_llm" or is_hf_checkpoint(manifest):
        from enginehouse.runtime.tensorrt_llm.deployment import open_deployment

        deployment = open_deployment(path, options)
        from enginehouse.runtime.tensorrt_llm.executor import TrtllmExecutor

        return TrtllmExecutor(deployment, options)
    if manifest.backend == "tensorrt":
        from enginehouse.runtime.tensorrt.executor import open_tensorrt

        return open_tensorrt(path, options)
    if manifest.backend not in ("torch", "cpu"):
        raise EngineError(
            f"{path} was built for backend {manifest.backend!r}; wanted torch, cpu, tensorrt or "
            "tensorrt_llm: build the engine again"
        )
    engine = read_engine(path)
    verify_files(engine)
    if manifest.backend == "cpu":
        from enginehouse.runtime.cpu.executor import CpuExecutor

        return CpuExecutor(engine, options)
    from enginehouse.runtime.torch.executor import TorchExecutor

    return TorchExecutor(engine, options)
