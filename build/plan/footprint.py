"""What a plan needs on each GPU, and how many requests that leaves room for.

Arithmetic on shapes alone: no weight is read, no GPU is asked. Weights and KV bytes are exact;
activations and the runtime's own share are estimates and said to be so.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from enginehouse.build.families.output_table import distinct_linears
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.forms.weight_forms import GROUP_SIZES
from enginehouse.build.plan.build_plan import BuildPlan
from enginehouse.build.plan.cuts import legal_tp
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import MemoryRecord

GIB = 2**30

# Memory of one GPU, GiB, about as the driver reports it.
GPU_MEMORY_GIB = {
    **dict.fromkeys(("a10", "a10g", "l4"), 22.5),
    **dict.fromkeys(("a30", "rtx3090", "rtx4090"), 23.6),
    "rtx5090": 31.8,
    **dict.fromkeys(("a40", "l40", "l40s"), 44.7),
    "rtx6000ada": 47.5,
    **dict.fromkeys(("a100", "h100"), 79.3),
    "gh200": 94.5,
    **dict.fromkeys(("h20", "rtxpro6000"), 95.3),
    "gb10": 119.0,
    "h200": 140.4,
    **dict.fromkeys(("b200", "gb200"), 179.1),
    **dict.fromkeys(("b300", "gb300"), 268.6),
}
DEFAULT_GPU = "h100"
# CUDA context, NCCL and library workspaces, the engine's code: measured 1 to 2 GiB.
_RUNTIME_BYTES = 2 * GIB
# TensorRT-LLM gives this share of what is left to the KV cache; the rest absorbs peaks.
_KV_SHARE = 0.9


class Footprint(NamedTuple):
    """One GPU's memory, bytes, for the rank that needs most.

    kv_sequence: keys and values of one sequence of kv_window tokens. A longer one needs no more
    where the runtime keeps windows; a shorter one its share. state: what linear attention keeps of
    each sequence, however long.
    """

    weights: int
    activations: int  # estimate
    runtime: int  # estimate
    kv_per_token: int
    kv_sequence: int
    kv_window: int
    state: int

    def kv_of(self, context: int) -> int:
        """What one sequence of `context` tokens takes."""
        return self.state + self.kv_sequence * min(context, self.kv_window) // self.kv_window


def footprint(plan: BuildPlan) -> Footprint:
    """What the fullest rank holds while it serves the plan's limits."""
    per_token = kv_bytes_per_token(plan.config, kept_latents(plan))
    windows = kept_windows(plan) or ()
    return Footprint(
        weights=max(plan.rank_bytes),
        activations=_activation_bytes(plan),
        runtime=_RUNTIME_BYTES,
        kv_per_token=per_token,
        kv_sequence=windowed_bytes(plan) if windows else per_token * plan.max_seq_len,
        kv_window=min(windows, default=plan.max_seq_len),
        state=_state_bytes(plan.config),
    )


def kept_windows(plan: BuildPlan) -> tuple[int, ...] | None:
    """The tokens that each layer keeps of a sequence; None where all are kept.

    TensorRT-LLM gives every size of window a pool of its own, as large as the window, so that a
    sequence that fills the smallest counts whole. The torch backend and our TensorRT runner keep
    what a window hides.
    """
    windows = plan.max_attention_window
    return windows if plan.settings.backend == "tensorrt_llm" else None


def windowed_bytes(plan: BuildPlan) -> int:
    """Keys and values of a sequence of max_seq_len on the fullest stage: of each layer a window."""
    config, windows = plan.config, plan.max_attention_window or ()
    mapping, count = config.mapping, config.num_hidden_layers
    stages = [mapping.layers(pp_rank, count) for pp_rank in range(mapping.pp_size)]
    tokens = max(sum(min(windows[i], plan.max_seq_len) for i in stage) for stage in stages)
    return tokens * kv_bytes_per_token(config) // len(stages[0])


def kept_latents(plan: BuildPlan) -> int:
    """How often a runtime keeps the latents of a token: as keys and as values, which the others
    have as heads of their own, or in our TensorRT network once.
    """
    return 1 if plan.settings.backend == "tensorrt" else 2


def kv_bytes_per_token(config: ModelConfig, latents: int = 2) -> int:
    """Keys and values of one token on one GPU of the fullest pipeline stage. latents: how often
    those of a layer that has them are kept.
    """
    mapping = config.mapping
    stages = (mapping.layers(i, config.num_hidden_layers) for i in range(mapping.pp_size))
    copies = 2 if config.latent is None else latents
    numbers = copies * max(sum(_kv_numbers(config, layer) for layer in stage) for stage in stages)
    width = 2 if config.quantization.kv_cache_quant_algo is None else 1
    if config.dtype == "float32" and width == 2:
        width = 4
    return numbers * width


def _kv_numbers(config: ModelConfig, layer: int) -> int:
    """Of one layer's keys of one token on a GPU."""
    own, tp = config.of_layer(layer), config.mapping.tp_size
    heads = max(1, own.num_key_value_heads // tp)
    return heads * own.head_size if config.has_keys(layer) else 0


def _state_bytes(config: ModelConfig) -> int:
    """Of a sequence, on one GPU of the stage with most layers of linear attention."""
    mapping, delta = config.mapping, config.delta
    if delta is None:
        return 0
    stages = (mapping.layers(i, config.num_hidden_layers) for i in range(mapping.pp_size))
    layers = max(sum(map(config.is_linear, stage)) for stage in stages)
    return layers * delta.state_bytes(4 if config.dtype == "float32" else 2) // mapping.tp_size


def _activation_bytes(plan: BuildPlan) -> int:
    """The widest pair of layers' inputs and outputs, and the logits of a full batch, or of every
    token of an iteration where trtllm-build is asked for those of prompts.
    """
    config, settings = plan.config, plan.settings
    width = 4 if config.dtype == "float32" else 2
    widths = [_between(config, *pair) for pair in _PAIRS]
    widest = max([*widths, _experts_width(config, settings.backend == "tensorrt")])
    tokens = plan.max_num_tokens * (2 * config.hidden_size + widest) * width
    flags = plan.builder_flags
    gathers = "enable" in map(flags.get, ("gather_context_logits", "gather_all_token_logits"))
    rows = plan.max_num_tokens if gathers else settings.max_batch_size
    return tokens + rows * config.padded_vocab_size() * 4


# What gives a layer's widest activations, and what reads them.
_PAIRS = (
    ("attention.qkv", "attention.dense"),
    ("linear_attention.in_qkvz", "linear_attention.dense"),
    ("mlp.fc", "mlp.proj"),
    ("mlp.shared_expert.fc", "mlp.shared_expert.proj"),
)


def _between(config: ModelConfig, first: str, second: str) -> int:
    """Elements of one token between two linears, at most; 0 where no layer has them."""
    linears = distinct_linears(config)
    given = [linear.out_features for name, linear in linears if name == first]
    read = [linear.in_features for name, linear in linears if name == second]
    return max(given, default=0) + max(read, default=0)


def _experts_width(config: ModelConfig, natively: bool) -> int:
    """In a mixture every chosen expert has a copy of the token, what fc gives of it, and what
    enters proj. In our TensorRT network all experts have the last two.
    """
    if not config.num_experts:
        return 0
    inner = config.moe_intermediate_size // config.mapping.tp_size
    if natively:
        return config.num_experts * 3 * inner
    return int(config.extra["moe"]["top_k"]) * (config.hidden_size + 3 * inner)


def kv_budget(needs: Footprint, memory_gib: float) -> int:
    """Bytes left for the KV cache on a GPU of this size; negative when the engine does not fit."""
    left = int(memory_gib * GIB) - needs.weights - needs.activations - needs.runtime
    return int(left * _KV_SHARE) if left > 0 else left


def concurrent_requests(needs: Footprint, memory_gib: float, context: int) -> int:
    """Sequences of `context` tokens whose keys and values fit at once."""
    return max(0, kv_budget(needs, memory_gib) // needs.kv_of(context))


def padding_price(before: ModelConfig, after: ModelConfig) -> str:
    """What is padded, and what it costs: words for people, none where nothing is."""
    repeated = after.num_attention_heads == before.num_attention_heads
    pairs = {
        "heads": (before.num_attention_heads, after.num_attention_heads),
        "KV heads, repeated" if repeated else "KV heads": (
            before.num_key_value_heads,
            after.num_key_value_heads,
        ),
        "columns of each expert" if before.num_experts else "MLP columns": (
            before.moe_intermediate_size,
            after.moe_intermediate_size,
        ),
    }
    words = [f"{old} -> {new} {what}" for what, (old, new) in pairs.items() if old != new]
    if not words:
        return ""
    old, new = (sum(map(prod, expected_shapes(config).values())) for config in (before, after))
    share = f"+{100 * (new / old - 1):.1f} % weights"
    return f"padded for TP {after.mapping.tp_size}: {', '.join([*words, share])}"


def memory_record(plan: BuildPlan) -> MemoryRecord:
    """The memory of the GPU that the plan names, or of the usual one, and what it allows."""
    gpu = plan.settings.gpu or DEFAULT_GPU
    memory_gib, needs = GPU_MEMORY_GIB[gpu], footprint(plan)
    most = plan.settings.max_batch_size
    return MemoryRecord(
        gpu=gpu,
        total=int(memory_gib * GIB),
        weights=needs.weights,
        activations=needs.activations,
        runtime=needs.runtime,
        kv_cache=max(0, kv_budget(needs, memory_gib)),
        requests=tuple(
            (context, min(most, concurrent_requests(needs, memory_gib, context)))
            for context in _contexts(plan.max_seq_len)
        ),
    )


def page_rows(plan: BuildPlan) -> list[tuple[str, str]]:
    """What a plan takes, on each GPU and on this machine: a name and words; ("", "") parts them.

    The plan's `gpu` names the GPU; its legality was settled with the plan.
    """
    gpu = plan.settings.gpu or DEFAULT_GPU
    memory_gib = GPU_MEMORY_GIB[gpu]
    needs = footprint(plan)
    settings, config = plan.settings, plan.config
    budget = kv_budget(needs, memory_gib)
    groups = GROUP_SIZES.get(settings.quant, ())
    if plan.group_size and (settings.group_size or plan.scale_dtype):  # asked for, or the source's
        groups = (plan.group_size,)
    legal = legal_tp(plan.unpadded, groups, int8=settings.quant == "int8")
    price = padding_price(plan.unpadded, config)
    quant = settings.quant + (f", groups of {plan.group_size}" if plan.group_size else "")
    return [
        ("model", f"{plan.name} ({config.architecture}, {plan.num_parameters / 1e9:.2f} B)"),
        ("form", f"{quant}; the rest {config.dtype}"),
        *([("source", "quantised, and dequantised first")] if plan.rounded_twice else []),
        ("cut", f"TP {settings.tp} x PP {settings.pp} = {config.mapping.world_size} GPUs"),
        ("legal TP", ", ".join(map(str, legal)) or "none"),
        *([("padding", price)] if price else []),
        ("on disk", f"{sum(plan.rank_bytes) / GIB:.2f} GiB in {len(plan.rank_bytes)} rank files"),
        ("peak host memory", f"about {plan.peak_memory_bytes / GIB:.2f} GiB to convert"),
        ("", ""),
        (f"each {gpu}", f"{memory_gib:.1f} GiB"),
        ("weights", f"{needs.weights / GIB:.2f} GiB"),
        (
            "activations",
            f"about {needs.activations / GIB:.2f} GiB at {plan.max_num_tokens} tokens an iteration",
        ),
        ("runtime", f"about {needs.runtime / GIB:.2f} GiB"),
        ("KV cache", _budget_words(budget, needs, plan)),
        ("KV per token", f"{needs.kv_per_token / 1024:.1f} KiB on each GPU"),
        *([("linear attention", _state_words(needs.state))] if needs.state else []),
        *([("windows", _window_words(plan))] if plan.max_attention_window else []),
    ]


def print_page(plan: BuildPlan, console: Console) -> None:
    """The page of `--plan`: its rows, and the requests that they allow."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in page_rows(plan):
        table.add_row(key, value)
    console.print(table)
    requests = Table("context, tokens", "concurrent requests", box=None, pad_edge=False)
    for context, count in memory_record(plan).requests:
        bound = " (max_batch_size)" if count == plan.settings.max_batch_size else ""
        requests.add_row(f"{context:,}", f"{count}{bound}")
    console.print()
    console.print(requests)


def _window_words(plan: BuildPlan) -> str:
    """What attention windows spare, and whom."""
    windows, length = plan.max_attention_window or (), plan.max_seq_len
    sliding = sum(window < length for window in windows)
    whole = kv_bytes_per_token(plan.config) * length
    spared = f"{windowed_bytes(plan) / GIB:.2f} GiB instead of {whole / GIB:.2f}"
    if kept_windows(plan):
        who = f"a sequence of {length:,} keeps {spared}"
    elif plan.settings.format == "hf":
        who = f"counted whole; a runtime that keeps windows needs {spared} for {length:,} tokens"
    else:
        who = f"backend={plan.settings.backend} keeps all the same; tensorrt_llm {spared}"
    return f"{sliding} of {len(windows)} layers look back {min(windows):,} tokens: {who}"


def _state_words(state: int) -> str:
    return f"{state / 2**20:.2f} MiB a sequence on each GPU, however long it is"


def _budget_words(budget: int, needs: Footprint, plan: BuildPlan) -> str:
    if budget < 0:
        return f"none: {-budget / GIB:.2f} GiB too little; choose more GPUs or a smaller form"
    if kept_windows(plan):
        holds = f"{budget // needs.kv_sequence:,} sequences of {plan.max_seq_len:,} tokens"
    else:
        holds = f"{budget // needs.kv_per_token:,} tokens"
    return f"{budget / GIB:.2f} GiB, {holds}"


def _contexts(limit: int) -> list[int]:
    """Round context lengths up to the limit, and the limit itself."""
    return [*(c for c in (2048, 8192, 32768, 65536) if c < limit), limit]
