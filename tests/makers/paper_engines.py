"""Engine directories whose files hold nothing: what only reads a manifest and a config reads them.

Weights are holes of the size that is asked for, so that sums of bytes are those of a real engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from enginehouse.runtime.engine import (
    BuildRecord,
    FileRecord,
    Limits,
    Manifest,
    MemoryRecord,
    ModelRecord,
    write_manifest,
)

GIB = 2**30
LAYERS, KV_HEADS, HEAD_SIZE = 16, 8, 64


def paper_engine(
    folder: Path,
    backend: str = "tensorrt_llm",
    *,
    tp: int = 1,
    pp: int = 1,
    rank_bytes: int = 1000,
    sm: str | None = None,
    targets: list[int] | None = None,
    needs: tuple[int, int, int] | None = None,
    kv_cache_gib: float | None = None,
    name: str = "Paper_8B.fp8",
    format: str = "trtllm",
) -> Path:
    """needs: bytes of a GPU as planned: weights, activations, runtime."""
    folder.mkdir(parents=True)
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    config = {
        **{"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "logits_dtype": "float32"},
        **{"vocab_size": 512, "hidden_size": 512, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": 8, "num_key_value_heads": KV_HEADS, "head_size": HEAD_SIZE},
        **{"intermediate_size": 1024, "hidden_act": "silu", "norm_epsilon": 1e-5},
        **{"position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 2048},
        **{"rotary_base": 10000.0, "mapping": {**mapping, "cp_size": 1, "gpus_per_node": 8}},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    (folder / "config.json").write_text(json.dumps(config))
    suffix = "engine" if backend == "tensorrt_llm" and format != "hf" else "safetensors"
    for rank in range(tp * pp):
        with (folder / f"rank{rank}.{suffix}").open("wb") as file:
            file.truncate(rank_bytes)
    files = {path.name: FileRecord(path.stat().st_size, "0" * 64) for path in folder.iterdir()}
    memory = None if needs is None else MemoryRecord("h100", 80 * GIB, *needs, 0, ())
    record: dict[str, Any] = {"tensorrt": None if targets is None else {"targets": targets}}
    manifest = Manifest(
        **{"format": 1, "name": name, "created": "2026-01-01T00:00:00+00:00", "backend": backend},
        model=ModelRecord("paper", (2,)),
        limits=Limits(1024, 8, 512, 32, kv_cache_gib=kv_cache_gib),
        **{"source": {}, "choices": {"format": format}, "versions": {}},
        **{"files": files, "digest": f"sha256:{name}", "machine": {"sm": sm}},
        build=None if memory is None else BuildRecord(0, 0, 0, (), memory),
        **record,
    )
    write_manifest(folder, manifest)
    return folder
