"""Time conversions against `cp` of the same bytes, on a random checkpoint of a named shape.

    python scripts/bench_convert.py                  # a 1B Llama shape, every form
    python scripts/bench_convert.py --shape 8b --forms none int4 --dir /big/disk

    python scripts/bench_convert.py --modelopt /venv/bin/python [--sample MODEL.gguf]

The last puts FP8 and INT4 AWQ beside nvidia-modelopt's on the sample model instead: time, memory
and held-out perplexity, by bench_quality.py.

Forms and cp take turns, `--rounds` times each; a row gives medians, the ratio of medians to cp,
and the child's peak resident memory. The checkpoint (2.5 GB for 1b, 16 GB for 8b) is made once in
--dir and left there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, vocabulary
    "tiny": (512, 1408, 4, 8, 4, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b-layer": (8192, 28672, 1, 64, 8, 49152),  # what calibration holds of a 70B model at once
}
# A virtual machine gives the memory that one run frees back to its host, which takes some seconds;
# after them all runs start alike, and each asks for its pages anew.
SETTLE_S = 6.0
FORMS = ("none", "fp8_rowwise", "int4")


class Result(NamedTuple):
    """One form: seconds of each round, and peak resident memory in bytes."""

    name: str
    seconds: list[float]
    peak_bytes: int
    written_bytes: int


def tensor_shapes(shape: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return shapes


def write_checkpoint(directory: Path, shape: str) -> None:
    """A bfloat16 checkpoint of normal noise, written tensor by tensor."""
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    header: dict[str, object] = {}
    end = 0
    for name, dims in tensor_shapes(shape).items():
        start, end = end, end + 2 * torch.Size(dims).numel()
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    partial = directory / "model.partial"
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dims in tensor_shapes(shape).values():
            left = torch.Size(dims).numel()
            while left:
                piece = noise[: min(left, len(noise))]
                file.write(piece.view(torch.uint8).numpy().data)
                left -= len(piece)
    partial.rename(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def timed_child(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"bench_convert: {' '.join(command)} ended with status {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def run(source: Path, work: Path, forms: list[str], rounds: int) -> list[Result]:
    """cp and every form in turn, `rounds` times; each result is flushed to the disk and deleted."""
    build = str(Path(sys.executable).with_name("enginehouse-build"))
    commands = {"cp": ["cp", str(source / "model.safetensors"), str(work / "copy")]}
    for form in forms:
        flags = ["--quant", form, "-o", str(work / "out"), "--until", "convert", "--quiet"]
        commands[form] = [build, str(source), *flags]
    results = {name: Result(name, [], 0, 0) for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            os.sync()
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            _, peak = timed_child(command)
            os.sync()  # both write to the page cache; both pay for the disk
            seconds = time.perf_counter() - start
            written = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
            old = results[name]
            results[name] = Result(
                name, [*old.seconds, seconds], max(old.peak_bytes, peak), written
            )
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return list(results.values())


def beside_modelopt(python: str, sample: str | None, figures: Path | None) -> int:
    """bench_quality.py for the two forms that modelopt has too; its exit status."""
    script = str(Path(__file__).with_name("bench_quality.py"))
    command = [sys.executable, script, "--modelopt", python, "--forms", "fp8,int4_awq"]
    command += ["--modelopt-forms", "FP8_DEFAULT_CFG,INT4_AWQ_CFG"]
    command += [sample] if sample else []
    return subprocess.call(command + (["--json", str(figures)] if figures else []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(".cache/bench"), help="where the files go")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--modelopt", help="Python of a venv with nvidia-modelopt, transformers")
    parser.add_argument("--sample", help="with --modelopt: another model, a directory or .gguf")
    args = parser.parse_args()
    if args.modelopt:
        return beside_modelopt(args.modelopt, args.sample, args.json)
    source = args.dir / f"checkpoint-{args.shape}"
    largest = 2 * max(torch.Size(dims).numel() for dims in tensor_shapes(args.shape).values())
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        print(f"making {source} ...", flush=True)
        write_checkpoint(source, args.shape)
    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    results = run(source, work, args.forms, args.rounds)
    copy_s = statistics.median(results[0].seconds)
    size = (source / "model.safetensors").stat().st_size
    print(f"\n{args.shape}: {size / 1e9:.2f} GB source, largest tensor {largest / 2**20:.0f} MiB")
    print(f"{'form':<14}{'seconds':>9}{'x cp':>7}{'GB/s read':>11}{'written':>10}{'peak RSS':>11}")
    for result in results:
        seconds = statistics.median(result.seconds)
        print(
            f"{result.name:<14}{seconds:>9.2f}{seconds / copy_s:>7.2f}{size / seconds / 1e9:>11.2f}"
            f"{result.written_bytes / 1e9:>8.2f}GB{result.peak_bytes / 2**20:>8.0f}MiB"
        )
    if args.json:
        args.json.write_text(json.dumps([result._asdict() for result in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
