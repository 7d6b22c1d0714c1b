"""What a GPU says and does without an engine, for gpu_check.py, which runs this apart.

python scripts/gpu_probe.py tensorrt    does TensorRT-RTX take the GPU: each step's outcome
python scripts/gpu_probe.py copy        bytes a second that a copy reads and writes
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from enginehouse.build.tensorrt.compile import PlanLimits, compile_plan, load_tensorrt
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.tensorrt.package import Words


def answers_of_tensorrt() -> list[str]:
    """Compile a decoder of one layer, and try to load it: each step's outcome in a line."""
    trt = load_tensorrt()
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="float16",
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_size=32,
        intermediate_size=512,
        norm_epsilon=1e-5,
        max_position_embeddings=256,
    )
    limits = PlanLimits(context=256, batch=8, chunk=64, prefill_batch=1, max_positions=256)
    plan = compile_plan(trt, config, (80, 86, 89, 120), limits).plan
    words = Words(trt)
    runtime = trt.Runtime(words.logger)
    validity, bits = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name for name, member in known if int(bits) & int(member.value)]
    lines = [
        f"TensorRT-RTX {trt.__version__}: a plan for SM80, 86, 89 and 120 on this GPU",
        f"get_engine_validity: {validity.name} {' '.join(reasons)}".rstrip(),
    ]
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return [*lines, f"deserialize_cuda_engine: {words.refused('loads it not')}"]
    lines.append(f"deserialize_cuda_engine: {engine.num_io_tensors} tensors")
    if engine.create_execution_context() is None:
        return [*lines, f"create_execution_context: {words.refused('makes none')}"]
    return [*lines, "create_execution_context: made"]


def copy_speed() -> float:
    """Bytes a second that copies of 1 GiB read and write on the first GPU."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for repeats in (3, 20):  # the first are for the clocks to rise
        torch.cuda.synchronize()
        began_s = time.monotonic()
        for _ in range(repeats):
            target.copy_(source)
        torch.cuda.synchronize()
        taken_s = time.monotonic() - began_s
    return 2 * len(source) * repeats / taken_s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("tensorrt", "copy"))
    args = parser.parse_args()
    print("\n".join(answers_of_tensorrt()) if args.what == "tensorrt" else copy_speed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
