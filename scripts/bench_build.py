"""Time and memory of compiling TensorRT plans: wall time, CPU time, peak memory, size, and
the scratch memory that the compiler says a GPU needs besides weights and caches.

All plans of an engine, as a build makes them: each in a process of its own, as many at once as
there are cores, from a shape alone, as they hold no weight. Needs the extra `tensorrt` and no GPU.

    python scripts/bench_build.py                       every form, SM80, SM89, SM120
    python scripts/bench_build.py --shapes nemotron-70b --forms fp8 --sms 89 --tp 4
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from enginehouse.build.forms.capabilities import tensorrt_refusal
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.tensorrt.compile import plan_limits
from enginehouse.build.tensorrt.plans import cached_tokens, compile_jobs, jobs_at_once, plan_jobs
from enginehouse.runtime.config import Mapping, ModelConfig

_COMMON = dict(
    architecture="LlamaForCausalLM", dtype="bfloat16", norm_epsilon=1e-5, rotary_base=500000.0
)
SHAPES = {
    "smollm2-135m": ModelConfig(
        **_COMMON,
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_size=64,
        intermediate_size=1536,
        max_position_embeddings=8192,
    ),
    "llama-1b": ModelConfig(
        **_COMMON,
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_size=64,
        intermediate_size=8192,
        max_position_embeddings=131072,
    ),
    "nemotron-70b": ModelConfig(
        **_COMMON,
        vocab_size=128256,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_size=128,
        intermediate_size=28672,
        max_position_embeddings=131072,
    ),
}
FORMS = sorted(QUANT_CONFIGS.keys() - {"w4a8_awq"})


def measure(config: ModelConfig, sm: int, context: int, layers: int | None) -> dict[str, float]:
    """All plans of an engine for batches of 32, up to this context."""
    classes = plan_limits(context, 32, 512, cached_tokens(config, (sm,)))
    with tempfile.TemporaryDirectory() as folder:
        jobs, _ = plan_jobs(config, (sm,), classes, Path(folder), layers)
        at_once = jobs_at_once(list(jobs.values()), psutil.virtual_memory().available)
        wall_s, cpu_s = time.monotonic(), _children_s()
        costs = compile_jobs(jobs, at_once, lambda _: None).values()
    return {
        "plans": len(costs),
        "wall_s": time.monotonic() - wall_s,
        "cpu_s": _children_s() - cpu_s,
        "process_mib": max(cost["peak_memory_bytes"] for cost in costs) / 2**20,
        "plan_mib": sum(cost["bytes"] for cost in costs) / 2**20,
        "decode_mib": max(cost["scratch_bytes"][0] for cost in costs) / 2**20,
        "prefill_mib": max(cost["scratch_bytes"][1] for cost in costs) / 2**20,
    }


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-1b"], choices=SHAPES)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--sms", nargs="+", type=int, default=[80, 89, 120])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048, help="the longest of the engine")
    parser.add_argument("--plan-layers", type=int, help="layers in one plan; without it, a build's")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        "| shape | TP | form | SM | context | plans | wall s | CPU s | process MiB | plans MiB |"
        " decode scratch MiB | prefill scratch MiB |"
    )
    print("| --- " * 12 + "|")
    for shape in args.shapes:
        for quant in args.forms:
            quantization = replace(QUANT_CONFIGS[quant], group_size=64)
            config = replace(SHAPES[shape], quantization=quantization)
            config = config.with_mapping(Mapping(args.tp))
            for sm in args.sms:
                head = f"| {shape} | {args.tp} | {quant} | {sm} | {args.context} |"
                reason = tensorrt_refusal(quant, "bfloat16", sm, args.tp)
                if reason is not None:
                    print(f"{head} {reason} | | | | | | |", flush=True)
                    continue
                found = measure(config, sm, args.context, args.plan_layers)
                cells = [f"{found['plans']}", *(f"{found[k]:.1f}" for k in ("wall_s", "cpu_s"))]
                cells += [
                    f"{found[k]:.0f}"
                    for k in ("process_mib", "plan_mib", "decode_mib", "prefill_mib")
                ]
                print(head, " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
