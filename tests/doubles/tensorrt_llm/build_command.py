"""trtllm-build: every flag and the whole checkpoint are checked, then an engine is written.

An engine of the double is the rank's weights with what they were compiled for in the header.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tensorrt_llm.contract import CLASSES, SIGNATURES
from tensorrt_llm.tables import check_config, expected_tensors

FLAGS = SIGNATURES["cli"]["trtllm-build"]
_KINDS = {"int": int, "str": str, "enable|disable": str}
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for flag, entry in FLAGS.items():
        names = [flag, *entry.get("aliases", [])]
        if entry["type"] == "flag":
            parser.add_argument(*names, action="store_true")
            continue
        parser.add_argument(
            *names,
            type=_KINDS.get(entry["type"], str),
            nargs="+" if entry["type"] == "list[str]" else None,
            choices=entry.get("choices"),
            default=entry["default"],
        )
    return parser


def gpu() -> tuple[str, int]:
    """Name and SM of the first GPU: without one nothing is built."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    name, _, capability = subprocess.check_output(command, text=True).strip().rpartition(", ")
    return name, int(capability.replace(".", ""))


def check_combination(args: argparse.Namespace, config: dict[str, Any], sm: int) -> None:
    """Raise for settings that 1.2.1 cannot build together."""
    quantization = config.get("quantization", {})
    algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    paged = args.use_paged_context_fmha == "enable"
    if kv_algo == "FP8" and algo not in _FP8 and paged:
        raise ValueError("FP8 Paged Context FMHA only works with fp8 quantization workflow")
    if kv_algo == "INT8" and paged:
        raise ValueError("INT8 KV cache does not work with paged context FMHA")
    if args.streamingllm == "enable":
        raise ValueError("StreamingLLM is not supported any more")
    if algo in _FP8 and sm < 89:
        raise RuntimeError(f"FP8 is not supported on SM{sm}")
    if args.fast_build and algo not in (None, *_FP8):
        raise ValueError("fast_build does not work with weight-only quantization")
    fmha = args.use_fp8_context_fmha == "enable" and algo == "FP8"
    if fmha and os.environ.get("DOUBLE_NO_FP8_FMHA"):
        raise RuntimeError("[TensorRT-LLM][ERROR] FP8 context FMHA: no kernel found")
    if args.max_num_tokens < args.max_batch_size:
        raise ValueError("max_num_tokens must not be smaller than max_batch_size")


def check_tensors(config: dict[str, Any], rank: int, tensors: dict[str, Any]) -> None:
    expected = expected_tensors(config, rank)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise RuntimeError(f"Required but not provided tensors:{missing}")
    for name in sorted(tensors.keys() - expected.keys()):
        print(f"[TRT-LLM] [W] Unexpected tensor: {name}", file=sys.stderr)
    for name, (shape, dtypes) in expected.items():
        found = tensors[name]
        assert tuple(found.shape) == shape, f"{name}: {tuple(found.shape)}, wanted {shape}"
        dtype = str(found.dtype).removeprefix("torch.")
        assert dtype in dtypes, f"{name}: {dtype}, wanted {' or '.join(dtypes)}"


def build_config(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The engine's build_config: BuildConfig's fields with what the flags said."""
    given = vars(args)
    absent = SIGNATURES["engine_dir"]["config.json"]["build_config_absent"]
    fields = {
        name: given.get(name, entry["default"])
        for name, entry in CLASSES["BuildConfig"]["fields"].items()
        if name not in absent
    }
    plugins = {}
    for name, entry in CLASSES["PluginConfig"]["fields"].items():
        value = given.get(name, entry["default"])
        if value in ("enable", "disable"):
            value = value == "enable" if isinstance(entry["default"], bool) else None
        plugins[name] = value
    fields["plugin_config"] = {**plugins, "dtype": config["dtype"]}
    fields["max_seq_len"] = fields["max_seq_len"] or config["max_position_embeddings"]
    fields["kv_cache_type"] = (given["kv_cache_type"] or "paged").upper()
    return fields


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)

    checkpoint, output = Path(args.checkpoint_dir), Path(args.output_dir)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    check_config(config)
    name, sm = gpu()
    check_combination(args, config, sm)
    output.mkdir(parents=True, exist_ok=True)
    built = {
        "version": version("tensorrt_llm"),
        "pretrained_config": config,
        "build_config": build_config(args, config),
    }
    header = {"sm": str(sm), "tensorrt": version("tensorrt")}
    for rank in range(config.get("mapping", {}).get("world_size", 1)):
        tensors = load_file(checkpoint / f"rank{rank}.safetensors")
        check_tensors(config, rank, tensors)
        save_file(tensors, output / f"rank{rank}.engine", metadata=header)
        print(f"[TRT-LLM] [I] Total time of building Unnamed Network {rank} on {name}", flush=True)
    (output / "config.json").write_text(json.dumps(built, indent=4), encoding="utf-8")
    print("[TRT-LLM] [I] Total time of building all engines: 00:00:01", flush=True)


if __name__ == "__main__":
    main()
