"""A build's report from its manifest, and a plan's page: one file of HTML each, with no script, no
font and no request in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.footprint import memory_record, page_rows
from enginehouse.build.report.axes import linear_axis
from enginehouse.build.report.bars import Bar, bars
from enginehouse.build.report.drawing import Drawing
from enginehouse.build.report.templates import Plot, templates
from enginehouse.build.report.words import amount, duration
from enginehouse.runtime.engine import BuildRecord, Manifest, MemoryRecord

Rows = Sequence[tuple[str, str]]
_DOTTED = 100  # layers, up to which each is a dot
_WEIGHTS = (".safetensors", ".engine", ".plan")


class Section(NamedTuple):
    title: str
    note: str = ""
    plots: Sequence[Plot] = ()
    rows: Rows = ()


def build_page(manifest: Manifest) -> str:
    """The page as text, to be written as UTF-8. A manifest of an older version, or of a checkpoint
    compiled elsewhere, has no record of its build: the page says so.
    """
    form = _form(manifest)
    sections = [Section("The engine", rows=_engine_rows(manifest))]
    record = manifest.build
    if record is None:
        sections += [
            Section("Quality", rows=_verify_rows(manifest)),
            Section("The build", "Its stages, errors and plan were not kept in the manifest."),
        ]
    else:
        sections += [
            _size(manifest, record),
            Section("Quality", *_quality(record, form), rows=_verify_rows(manifest)),
            _cost(record),
            *_memory(record.memory),
        ]
    lead = f"{manifest.model.name} in {form}, built {manifest.created}, {manifest.digest[:19]}"
    return _page(f"Build of {manifest.name}", lead, sections)


def plan_page(plan: BuildPlan) -> str:
    """What `--plan` prints, as a page with the memory of a GPU drawn."""
    rows = [row for row in page_rows(plan) if row[0]]
    sections = [*_memory(memory_record(plan)), Section("What it takes", rows=rows)]
    return _page(f"Plan of {plan.name}", "What the engine takes, before it is built.", sections)


def _page(title: str, lead: str, sections: Iterable[Section]) -> str:
    known = [one for one in sections if one.note or one.plots or one.rows]
    return templates().get_template("page.html").render(title=title, lead=lead, sections=known)


def _form(manifest: Manifest) -> str:
    choices = manifest.choices
    size = choices.get("group_size")
    return f"{choices.get('quant')}{f', groups of {size}' if size else ''}"


def _engine_rows(manifest: Manifest) -> Rows:
    known = {key: value for key, value in manifest.choices.items() if value not in (None, "", {})}
    limits = manifest.limits
    machine = manifest.machine or {}
    return [
        ("model", f"{manifest.model.name} ({manifest.model.license or 'no licence is named'})"),
        ("backend", manifest.backend),
        (
            "limits",
            f"{limits.max_seq_len:,} tokens of context, {limits.max_batch_size} sequences, "
            f"{limits.max_num_tokens} tokens an iteration",
        ),
        ("choices", ", ".join(f"{key} {value}" for key, value in known.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.versions.items())),
        *([("machine", ", ".join(filter(None, machine.values())))] if machine else []),
        ("source", f"{manifest.source.get('name')}, {manifest.source.get('digest')}"),
        ("digest", manifest.digest),
    ]


def _size(manifest: Manifest, record: BuildRecord) -> Section:
    files = [
        (name, file.bytes)
        for name, file in sorted(manifest.files.items())
        if name.endswith(_WEIGHTS)
    ]
    before, after = record.source_bytes, sum(size for _, size in files)
    most = max(before, after, 1)
    each = [
        Bar("source", amount(before), before / most),
        Bar("engine", f"{amount(after)}, {after / max(before, 1):.1%}", after / most),
    ]
    bits = 8 * record.weight_bytes / max(record.num_parameters, 1)
    told = f"{record.num_parameters / 1e9:.3g} B parameters, {bits:.2f} bits each"
    plot = Plot("Weights before and after", told, bars("Weights before and after", each))
    return Section("Size", plots=[plot], rows=[(name, amount(size)) for name, size in files])


def _quality(record: BuildRecord, form: str) -> tuple[str, list[Plot]]:
    """A note where there is no plot, and the plot of each layer's error."""
    if not record.errors:
        return f"No layer was rounded while it was converted: {form}.", []
    layers = [(float(layer), error) for layer, error in record.errors]
    worst, largest = max(record.errors, key=lambda pair: pair[1])
    caption = f"of {record.errors_of}, relative, root mean square; most at {worst}: {largest:.2%}"
    x = linear_axis("layer", layers[0][0], layers[-1][0])
    y = linear_axis("relative error, %", 0.0, 100 * largest or 1.0, to_tick=True)
    drawing = Drawing(f"Quantisation error by layer, {caption}", x, y)
    points = [(layer, 100 * error) for layer, error in layers]
    drawing.line(points, "new")
    if len(points) <= _DOTTED:
        drawing.dots(points, "new")
    return "", [Plot("Quantisation error by layer", caption, drawing.svg())]


def _verify_rows(manifest: Manifest) -> Rows:
    found = manifest.verify
    if found is None:
        return [("verify", "was not asked for")]
    return [
        ("KL divergence, mean", f"{found['mean_kl']:.4f} nats"),
        ("KL divergence, largest", f"{found['max_kl']:.3f} nats"),
        ("same first choice", f"{found['top1_agreement']:.1%} of {found['num_positions']} tokens"),
        ("prompt", str(found.get("prompt", ""))),
        ("answer", str(found.get("answer", ""))),
    ]


def _cost(record: BuildRecord) -> Section:
    stages = [stage for stage in record.stages if stage.seconds >= 0.05]
    slowest = max((stage.seconds for stage in stages), default=1.0)
    fullest = max((stage.peak_bytes for stage in stages), default=1)
    times = [Bar(stage.name, duration(stage.seconds), stage.seconds / slowest) for stage in stages]
    peaks = [
        Bar(stage.name, amount(stage.peak_bytes), stage.peak_bytes / fullest) for stage in stages
    ]
    total = f"{_took(sum(stage.seconds for stage in record.stages))} in all"
    return Section(
        "Time and memory of the build",
        plots=[
            Plot("Time of each stage", total, bars("Time of each stage", times)),
            Plot(
                "Peak memory of each stage",
                "resident, of the building process",
                bars("Peak memory of each stage", peaks),
            ),
        ],
    )


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _memory(memory: MemoryRecord) -> list[Section]:
    parts = {
        "weights": memory.weights,
        "activations, about": memory.activations,
        "runtime, about": memory.runtime,
        "KV cache": memory.kv_cache,
    }
    whole, start, rows = max(memory.total, sum(parts.values())), 0.0, []
    for name, size in parts.items():
        rows.append(Bar(name, f"{amount(size)}, {size / memory.total:.1%}", size / whole, start))
        start += size / whole
    most = max((count for _, count in memory.requests), default=0) or 1
    requests = [
        Bar(f"{context:,} tokens", f"{count}", count / most) for context, count in memory.requests
    ]
    caption = f"{amount(memory.total)}, as planned"
    note = "" if memory.kv_cache else f"The engine does not fit on a {memory.gpu}."
    return [
        Section(
            "Memory and concurrency",
            note,
            [
                Plot(f"Each {memory.gpu}", caption, bars(f"Memory of a {memory.gpu}", rows)),
                Plot(
                    "Requests at once by context",
                    "up to max_batch_size",
                    bars("Requests at once by context", requests),
                ),
            ],
        )
    ]
