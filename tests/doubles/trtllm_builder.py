"""A scripted trtllm-build: writes what a test needs an engine folder to hold, or fails as told.

`python trtllm_builder.py` is the program itself; TRTLLM_BUILDER says how it behaves.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path


def install(directory: Path) -> Path:
    """A program named trtllm-build in `directory`."""
    program = directory / "trtllm-build"
    program.write_text(f"#!{sys.executable}\n{Path(__file__).read_text(encoding='utf-8')}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint_dir", type=Path)
    parser.add_argument("--output_dir", type=Path)
    args, rest = parser.parse_known_args()
    flags = dict(zip(rest[::2], rest[1::2], strict=False))
    how = os.environ.get("TRTLLM_BUILDER", "")
    print("[TRT-LLM] [I] Set use_fp8_context_fmha to True.")
    print(f"ranks known from outside: {sorted(k for k in os.environ if k.startswith('SLURM_'))}")
    if how == "fmha" and flags["--use_fp8_context_fmha"] == "enable":
        print("[TensorRT-LLM][ERROR] Assertion failed: FP8 FMHA cannot be enabled on this GPU")
        (args.output_dir / "rank0.engine").write_bytes(b"half")
        return 1
    if how == "broken":
        print("[TRT] [E] Error Code 2: something else")
        return 1
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "hang":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"worker {worker.pid}", flush=True)
        time.sleep(600)
    if how == "leaves a worker":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"worker {worker.pid}", flush=True)
    config = json.loads((args.checkpoint_dir / "config.json").read_text())
    for rank in range(config["mapping"]["world_size"] - (how == "rank missing")):
        (args.output_dir / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
        print(f"[TRT-LLM] [I] Build phase of rank {rank} done")
    names = ("max_seq_len", "max_batch_size", "max_num_tokens")
    limits = {name: int(flags[f"--{name}"]) for name in names}
    if how == "smaller":
        limits["max_batch_size"] -= 1
    Path("model.cache").write_bytes(b"timings")
    whole = {"version": "1.2.1", "pretrained_config": config, "build_config": limits}
    (args.output_dir / "config.json").write_text(json.dumps(whole))
    return 0


if __name__ == "__main__":
    sys.exit(main())
