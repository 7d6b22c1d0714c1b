"""Time and memory of compiling TensorRT plans: wall time, CPU time, peak RSS, plan size.

Each plan is compiled in a process of its own, from a shape alone: it holds no weight. Needs the
extra `tensorrt` and no GPU.

    python scripts/bench_build.py                       every form, SM80, SM89, SM120
    python scripts/bench_build.py --shapes nemotron-70b --forms fp8 --sms 89 --tp 4
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

from enginehouse.build.capabilities import tensorrt_refusal
from enginehouse.build.compile_tensorrt import PlanLimits, compile_plan, load_tensorrt
from enginehouse.build.forms import QUANT_CONFIGS
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


def measure(shape: str, quant: str, sm: int, tp: int, context: int) -> dict[str, float]:
    """One plan, in this process."""
    config = replace(SHAPES[shape], quantization=replace(QUANT_CONFIGS[quant], group_size=64))
    limits = PlanLimits(context, 32, 512, 1, context)
    wall_s, cpu_s = time.monotonic(), time.process_time()
    plan = compile_plan(load_tensorrt(), config.with_mapping(Mapping(tp)), [sm], limits)
    return {
        "wall_s": time.monotonic() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "added_mib": plan.peak_memory_bytes / 2**20,
        "process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "plan_mib": len(plan.plan) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m", "llama-1b"], choices=SHAPES)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--sms", nargs="+", type=int, default=[80, 89, 120])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        shape, quant, sm = args.shapes[0], args.forms[0], args.sms[0]
        print(json.dumps(measure(shape, quant, sm, args.tp, args.context)))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; contexts of {args.context}")
    print("| shape | TP | form | SM | wall s | CPU s | added MiB | process MiB | plan MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in args.shapes:
        for quant in args.forms:
            for sm in args.sms:
                head = f"| {shape} | {args.tp} | {quant} | {sm} |"
                reason = tensorrt_refusal(quant, "bfloat16", sm, args.tp)
                if reason is not None:
                    print(f"{head} {reason} | | | | |", flush=True)
                    continue
                command = [sys.executable, __file__, "--one", "--shapes", shape, "--forms", quant]
                command += ["--sms", str(sm), "--tp", str(args.tp), "--context", str(args.context)]
                found = json.loads(
                    subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                )
                cells = (f"{found[k]:.1f}" for k in ("wall_s", "cpu_s"))
                sizes = (f"{found[k]:.0f}" for k in ("added_mib", "process_mib", "plan_mib"))
                print(head, " | ".join([*cells, *sizes]), "|", flush=True)


if __name__ == "__main__":
    main()
