"""What a running engine tells of itself: of its manifest, and of the room that it got."""

from __future__ import annotations

from datetime import datetime

from enginehouse.runtime.batching.model_runner import ModelRunner
from enginehouse.runtime.batching.scheduler import Scheduler
from enginehouse.runtime.engine import Engine
from enginehouse.runtime.request import EngineInfo


def engine_info(engine: Engine, scheduler: Scheduler, runner: ModelRunner) -> EngineInfo:
    config, manifest = engine.config, engine.manifest
    return EngineInfo(
        name=manifest.name,
        model=manifest.model.name,
        quantization=config.quantization.quant_algo or config.dtype,
        backend=manifest.backend,
        tp_size=config.mapping.tp_size,
        pp_size=config.mapping.pp_size,
        max_seq_len=scheduler.max_seq_len,
        max_batch_size=scheduler.max_batch_size,
        max_num_tokens=scheduler.max_num_tokens,
        vocab_size=config.vocab_size,
        kv_block_size=scheduler.memory.block_size,
        num_kv_blocks=scheduler.memory.num_blocks,
        kv_cache_bytes=runner.kv_cache_bytes,
        eos_token_ids=manifest.model.eos_token_ids,
        digest=manifest.digest,
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
        embedding_size=runner.embedding_size,
    )
