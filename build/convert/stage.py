"""The convert stage: what was finished before, the calibration the form needs, the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from enginehouse.build.convert.conversion import convert
from enginehouse.build.convert.hf_export import HfCheckpoint
from enginehouse.build.convert.journal import Journal
from enginehouse.build.convert.rank_files import RankFiles
from enginehouse.build.plan.build_plan import BuildPlan, with_forms
from enginehouse.build.plan.expert_layout import experts_share_scales
from enginehouse.build.plan.quantized_before import carries_kv_scales
from enginehouse.build.progress import BuildProgress, mib
from enginehouse.build.quantize.calibration import calibration_sequences, kv_maxima, kv_scales
from enginehouse.build.quantize.layerwise import LayerwiseWalk
from enginehouse.build.quantize.layerwise_awq import LayerwiseAwq
from enginehouse.build.quantize.layerwise_fp8 import LayerwiseFp8
from enginehouse.build.quantize.layerwise_nvfp4 import LayerwiseMixed, LayerwiseNvfp4
from enginehouse.build.quantize.mixed_precision import MAX_TOKENS, choose_forms, measure_groups
from enginehouse.build.quantize.reference import ReferenceModel
from enginehouse.build.quantize.units import Calibration, by_layer, layer_of_unit, units
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.config import QuantConfig


def run_convert(
    plan: BuildPlan,
    source: SourceCheckpoint,
    reference: ReferenceModel,
    directory: Path,
    journal: Journal,
    progress: BuildProgress,
) -> None:
    """Calibrate if the form needs it, then write the checkpoint's files.

    What the journal knows to be finished is checked by its digests and left as it is.
    """
    with open_sink(plan, source, directory) as sink:
        entries = journal.entries()
        finished: set[str] = set()
        if entries:
            size = sum(stored.num_bytes for unit in entries.values() for stored in unit)
            with progress.stage("resume", size, "bytes") as stage:
                finished = journal.finished(sink, stage.advance)
                stage.finish(f"{len(finished)} of {len(entries)} finished parts are intact")
        calibration = _calibrate(plan, source, reference, directory, journal, finished, progress)
        layers = _calibrated_layers(plan, source, calibration)
        size = sum(plan.rank_bytes)
        total, counted = (len(layers), "layers") if layers else (size, "bytes")

        def amount(key: str, num_bytes: int) -> int:
            return int(key in layers) if layers else num_bytes

        with progress.stage("convert", total, counted) as stage:
            stored = {key: sum(item.num_bytes for item in entries[key]) for key in finished}
            stage.resume(sum(amount(key, num_bytes) for key, num_bytes in stored.items()))

            def advance(key: str, num_bytes: int) -> None:
                stage.advance(amount(key, num_bytes))

            convert(plan, source, sink, calibration, advance, journal, finished)
            files = len(list(directory.glob("*.safetensors")))
            stage.finish(f"{files} file(s), {mib(size)}")
        walk = calibration.linears
        if isinstance(walk, LayerwiseWalk) and walk.unseen:
            progress.note(
                f"{walk.unseen} expert(s) saw no token of the calibration text: what enters them "
                "is scaled as their layer's largest; raise --calib-samples for scales of their own"
            )


def _calibrated_layers(
    plan: BuildPlan, source: SourceCheckpoint, calibration: Calibration
) -> set[str]:
    """The units that take all the time where layers are calibrated one after the other: progress is
    counted in them, as the embedding's bytes are many and written at once.
    """
    if calibration.linears is None:
        return set()
    every = units(plan.config, source)
    return {unit.key for unit in every if layer_of_unit(plan.config, unit) is not None}


def open_sink(
    plan: BuildPlan, source: SourceCheckpoint, directory: Path
) -> HfCheckpoint | RankFiles:
    """What the format's files are written by."""
    if plan.settings.format == "hf":
        return HfCheckpoint(plan, source, directory)
    return RankFiles(plan, directory)


def _calibrate(
    plan: BuildPlan,
    source: SourceCheckpoint,
    reference: ReferenceModel,
    directory: Path,
    journal: Journal,
    finished: set[str],
    progress: BuildProgress,
) -> Calibration:
    """Run the calibration text where a form needs it; FP8 and AWQ do so while the layers are
    written.

    Linears that the source has quantised need none; a quantised KV cache does, unless its scales
    are the source's. Of the finished units, those of layers that must be walked through again are
    struck out.
    """
    kv_algo = plan.config.quantization.kv_cache_quant_algo
    layerwise = by_layer(plan.config.quantization) and source.quantized is None
    scales: Mapping[int, float] = {}
    carried = carries_kv_scales(plan.settings, source, plan.config)
    if carried and source.quantized is not None:
        scales = source.quantized.kv_scales(plan.config)
    measured = kv_algo is not None and not carried
    if not layerwise and not measured:
        return Calibration(scales)
    sequences = _calibration_sequences(plan, source, directory)
    if kv_algo is not None and measured:
        with progress.stage("calibrate", plan.config.num_hidden_layers, "layers") as stage:
            saved = journal.activations("calibration")
            maxima = kv_maxima(reference, sequences, stage.advance, saved)
            scales = kv_scales(maxima, kv_algo)
            tokens = sum(len(sequence) for sequence in sequences)
            stage.finish(f"{tokens} tokens in {len(sequences)} sequences")
    if not layerwise:
        return Calibration(scales)
    layers = {unit.key: layer_of_unit(plan.config, unit) for unit in units(plan.config, source)}
    left = [layer for key, layer in layers.items() if layer is not None and key not in finished]
    if not left:
        return Calibration(scales)
    kind = _walk_kind(plan.config.quantization)
    saved = journal.activations("layers")
    one_scale = experts_share_scales(plan.config, plan.settings)
    walk = kind(plan.config, reference, sequences, saved, min(left), plan.padding, one_scale)
    walk.errors = journal.errors
    finished -= {key for key, layer in layers.items() if layer is not None and layer >= walk.layer}
    return Calibration(scales, walk)


def _walk_kind(quantization: QuantConfig) -> type[LayerwiseWalk]:
    if quantization.pre_quant_scale:
        return LayerwiseAwq
    kinds = {"FP8": LayerwiseFp8, "MIXED_PRECISION": LayerwiseMixed}
    return kinds.get(str(quantization.quant_algo), LayerwiseNvfp4)


def choose_mixture(
    plan: BuildPlan, source: SourceCheckpoint, reference: ReferenceModel, progress: BuildProgress
) -> BuildPlan:
    """The plan of MIXED_PRECISION with a form for each linear, chosen by what each costs on the
    calibration text.
    """
    settings, config = plan.settings, plan.config
    forms = settings.mixed_forms.split(",")
    with TemporaryDirectory() as folder:
        ids = _calibration_sequences(plan, source, Path(folder))[0][:MAX_TOKENS]
    left_out = replace(config.quantization, quant_algo=None).excludes
    with progress.stage("choose", config.num_hidden_layers, "layers") as stage:
        groups = measure_groups(reference, ids, forms, left_out, stage.advance)
        choice = choose_forms(groups, settings.effective_bits, settings.max_kl)
        counts = {form: list(choice.forms.values()).count(form) for form in forms}
        shown = ", ".join(f"{count} in {form}" for form, count in counts.items())
        stage.finish(
            f"{choice.bits:.2f} bits a weight, KL {choice.kl:.4f} as the sum of each alone: {shown}"
        )
    return with_forms(plan, choice.forms)


def _calibration_sequences(
    plan: BuildPlan, source: SourceCheckpoint, directory: Path
) -> list[Tensor]:
    with ExitStack() as stack:
        if not (directory / "tokenizer.json").exists():  # a checkpoint alone holds none
            directory = Path(stack.enter_context(TemporaryDirectory(dir=directory)))
            source.write_tokenizer(directory)
        return calibration_sequences(
            directory,
            plan.settings.calib_samples,
            min(plan.settings.calib_length, plan.max_seq_len),
            source.bos_token_id,
        )
