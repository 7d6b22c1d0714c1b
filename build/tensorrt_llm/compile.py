"""The last stages of a build for TensorRT-LLM: compile the kept checkpoint, and check the answer.

    NAME.trtllm-build.log      what trtllm-build said

Also all of `enginehouse-build compile`, which starts from the checkpoint on the GPU machine.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import msgspec
import psutil

from enginehouse.build.convert.output_folder import refuse_foreign, replace_folder, unfinished
from enginehouse.build.forms.capabilities import lays_out_wrongly
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.choices import choices
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.build.tensorrt_llm.builder import (
    builder_flags,
    builder_machine,
    check_builder,
    compile_engine,
    find_builder,
    trtllm_build_command,
)
from enginehouse.build.tensorrt_llm.kept_checkpoint import checkpoint_path
from enginehouse.build.tensorrt_llm.smoke import SmokeFigures, greedy_answer, judge, refuse_garbage
from enginehouse.runtime.backends import open_executor
from enginehouse.runtime.engine import (
    Engine,
    Manifest,
    read_engine,
    verify_files,
    write_manifest,
)
from enginehouse.runtime.errors import EngineError, PlanError
from enginehouse.runtime.machine.gpus import visible_gpus


def check_machine_early(plan: BuildPlan) -> None:
    """PlanError before a weight is read when trtllm-build is here but cannot make this engine."""
    program = find_builder()
    if program is not None:
        checked = plan.settings.until == "verify"
        machine, quant = builder_machine(program), plan.settings.quant
        check_builder(quant, plan.config, machine, visible_gpus(), checked)


def finish_commands(checkpoint: Engine, output: Path) -> tuple[str, str]:
    """What the GPU machine runs: our command, and trtllm-build's own without manifest and check."""
    ours = shlex.join(["enginehouse-build", "compile", str(checkpoint.path), "-o", str(output)])
    flags = builder_flags(checkpoint.manifest.choices, checkpoint.config)
    return ours, shlex.join(trtllm_build_command(flags, checkpoint.path, output))


def planned_command(plan: BuildPlan, output: Path) -> str:
    """The trtllm-build line of a plan, whose checkpoint is not there yet."""
    flags = builder_flags(choices(plan), plan.config)
    return shlex.join(trtllm_build_command(flags, checkpoint_path(output), output))


def run_compile_checkpoint(
    checkpoint: Engine, output: Path, workers: int, until: str, progress: BuildProgress
) -> Manifest:
    """Compile, check the answer unless `until` is "compile", and put the engine in its place.

    Raises PlanError when trtllm-build is not here or cannot make this engine, EngineError when it
    fails or the engine answers wrongly. An interruption leaves the checkpoint.
    """
    program = find_builder()
    if program is None:
        raise PlanError(
            "trtllm-build is not on PATH; install tensorrt-llm==1.2.1 on a machine with the GPU "
            "that will serve, or set ENGINEHOUSE_TRTLLM_BUILD"
        )
    machine = builder_machine(program)
    gpus = visible_gpus()
    quant = checkpoint.manifest.choices["quant"]
    check_builder(quant, checkpoint.config, machine, gpus, until == "verify")
    if not gpus and machine.get("sm") is None:
        progress.note("nvidia-smi shows no GPU; trtllm-build needs one")
    refuse_foreign(output, until)
    compiled = f"{output} is compiled, and the same command checks its answer"
    left = f"{checkpoint.path} is whole: the same command compiles it again"
    try:
        with unfinished(output, "compile") as (directory, _):
            earlier = _compiled_before(checkpoint, output)
            if earlier is not None:
                directory, manifest, left = output, earlier, compiled
            else:
                manifest = compile_engine(
                    checkpoint, directory, output, program, machine, workers, progress
                )
                write_manifest(directory, manifest)
            if until == "compile":
                _put(directory, output)
                return manifest
            try:
                figures = run_smoke(checkpoint, directory, progress)
            except (EngineError, KeyboardInterrupt) as error:
                if _may_be_wrong(manifest):
                    raise
                _put(directory, output)  # compiling takes long
                left = compiled
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise EngineError(f"{compiled}, which could not be had now: {error}") from None
            manifest = _judged(directory, manifest, figures)
            _put(directory, output)
            return manifest
    except KeyboardInterrupt:
        raise KeyboardInterrupt(left) from None


def _put(directory: Path, output: Path) -> None:
    if directory != output:
        replace_folder(directory, output)


def _may_be_wrong(manifest: Manifest) -> bool:
    """Whether only its answer can tell that this engine computes rightly."""
    sm = (manifest.machine or {}).get("sm")
    return sm is not None and lays_out_wrongly(manifest.choices["quant"], int(sm))


def _judged(directory: Path, manifest: Manifest, figures: SmokeFigures) -> Manifest:
    """The manifest with its figures, written; EngineError, and no engine, for a wrong answer."""
    try:
        refuse_garbage(figures)
    except EngineError:
        shutil.rmtree(directory)
        raise
    manifest = msgspec.structs.replace(manifest, verify=figures._asdict())
    write_manifest(directory, manifest)
    return manifest


def _compiled_before(checkpoint: Engine, output: Path) -> Manifest | None:
    """The manifest of an engine that was compiled of this very checkpoint and never checked."""
    try:
        engine = read_engine(output)
        verify_files(engine)
    except EngineError:
        return None
    manifest = engine.manifest
    same = manifest.source.get("checkpoint") == checkpoint.manifest.digest
    same = same and manifest.choices == checkpoint.manifest.choices and still_fits(manifest)
    return manifest if same and manifest.verify is None else None


def run_smoke(checkpoint: Engine, directory: Path, progress: BuildProgress) -> SmokeFigures:
    """Let the compiled engine answer, and the CPU backend judge.

    Raises EngineError when the engine cannot be opened or the weights do not fit in memory.
    """
    needed = sum(checkpoint.manifest.files[name].bytes for name in _rank_names(checkpoint))
    free = psutil.virtual_memory().available
    if needed > free:
        raise EngineError(
            f"the CPU backend needs {mib(needed)} of memory to judge it and {mib(free)} are free"
        )
    with progress.stage("verify") as stage:
        executor = open_executor(directory)
        try:
            prompt, answer = greedy_answer(executor, checkpoint)
        finally:
            executor.close()
        figures = judge(checkpoint, prompt, answer)
        stage.finish(
            f"greedy answer of {figures.num_tokens} tokens: {figures.top1_agreement:.0%} are the "
            f"CPU backend's choice, none further off than {figures.max_gap:.2f} nats"
        )
    progress.note(f"{figures.prompt!r} -> {figures.answer.strip().splitlines()[:1]}")
    if figures.largest_activation is not None and (doubt := figures.largest_activation.doubt):
        progress.note(doubt)
    return figures


def _rank_names(checkpoint: Engine) -> list[str]:
    return [f"rank{rank}.safetensors" for rank in range(checkpoint.config.mapping.world_size)]


def still_fits(manifest: Manifest) -> bool:
    """Whether an engine that is there already would come out the same here."""
    program = find_builder()
    if program is None or manifest.machine is None:
        return manifest.machine is not None
    here = builder_machine(program)
    known = [key for key in ("tensorrt_llm", "tensorrt", "sm") if here.get(key) is not None]
    return all(manifest.machine.get(key) == here[key] for key in known)
