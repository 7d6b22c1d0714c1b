"""tensorrt_llm.LLM: the PyTorch backend, which takes Hugging Face directories and no engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from enginehouse.build.plan.settings import load_settings
from enginehouse.build.progress import BuildProgress
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.stages import build
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.torch.executor import TorchExecutor
from tensorrt_llm import engine_llm

_FIELDS = engine_llm.LLM.fields
_ENGINE_ONLY = (
    "build_config",
    "batching_type",
    "normalize_log_probs",
    "fast_build",
    "enable_build_cache",
    "embedding_parallel_mode",
    "extended_runtime_perf_knob_config",
    "workspace",
)


class LLM(engine_llm.LLM):
    """The checkpoint is converted for the CPU backend as a build would, and opened."""

    calls: list[tuple[str, Any]] = []
    fields = {
        **{
            name: entry for name, entry in engine_llm.LLM.fields.items() if name not in _ENGINE_ONLY
        },
        "enable_iter_performance_stats": {"type": "bool"},
    }

    def _open(self, path: Path) -> TorchExecutor:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "pretrained_config" in config or "model_type" not in config:
            raise ValueError(f"{path} is an engine or a TensorRT-LLM checkpoint; wanted a model")
        tp_size = self.args.get("tensor_parallel_size", 1)
        self.max_seq_len = self.args.get("max_seq_len") or config["max_position_embeddings"]
        self.max_input_len = self.max_seq_len
        self.vocab_size = config["vocab_size"]
        self.context_logits = True
        self._start_ranks(tp_size)
        checkpoint = Path(self._temporary.name) / "checkpoint"
        settings = {"output": str(checkpoint), "until": "convert", "tp": tp_size}
        source = resolve_source(str(path), Path(self._temporary.name), lambda line: None)
        build(load_settings(settings), source, BuildProgress(quiet=True))
        self._link_tokenizer(checkpoint)
        return engine_llm.open_torch(
            checkpoint,
            read_config(checkpoint),
            max_seq_len=self.max_seq_len,
            max_batch_size=self.args["max_batch_size"],
            max_num_tokens=self.args["max_num_tokens"],
            block_size=self.kv_cache_config.tokens_per_block,
            eos_token_ids=self.eos_token_ids,
        )
