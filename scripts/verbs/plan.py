"""`enginehouse plan`: what an engine takes on each GPU, before anything is read or written."""

from __future__ import annotations

from enginehouse.verbs.build import run

SHOWN = (
    *("pp", "gpu", "sm", "format", "kv_cache_dtype", "exclude", "max_seq_len", "max_batch_size"),
    "kv_cache_gib",
)


def main(argv: list[str]) -> int:
    return run(
        "plan",
        "Print what an engine would hold on each GPU (weights, KV cache, activations) and how many "
        "requests of which length that allows. A config.json alone is enough.",
        SHOWN,
        "enginehouse plan path/to/hf-checkpoint --quant fp8 --tp 4 --gpu h100",
        ["--plan", *argv],
    )
