"""The inputs of TensorRT plans that no step changes, but for the caches, on the GPU.

Weights come from a rank file, in the layouts of `inputs.py`; where the plans hold them,
they stay on the disk. Knows no plan and no step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from enginehouse.runtime.engine import Engine
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.device import to_device
from enginehouse.runtime.tensorrt.inputs import RotaryInputs, bound_weights
from enginehouse.runtime.tensorrt.manifest import Built, PlanRecord


def fixed_inputs(
    engine: Engine, built: Built, plans: Sequence[PlanRecord], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """By the model's names, for all of the plans, which rise in their contexts. Raises EngineError
    when the rank file cannot be read.
    """
    config = engine.config
    found: dict[str, Tensor] = {}
    if not built.baked:
        found |= _read_weights(engine, rank, device)
        rotary = RotaryInputs(config, plans[0].max_positions)
        found |= {name: table.to(device) for name, table in rotary.tables.items()}
    found["kv_positions"] = to_device(torch.arange(plans[-1].context, dtype=torch.int32), device)
    rows = config.padded_vocab_size() // config.mapping.tp_size
    found["vocab_start"] = to_device(torch.tensor([rank * rows], dtype=torch.int32), device)
    return found


def _read_weights(engine: Engine, rank: int, device: torch.device) -> dict[str, Tensor]:
    """A rank file's, one module of it at a time."""
    path, config = engine.rank_file(rank), engine.config
    bound: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for names in _modules(list(file.keys())):
                tensors = {name: file.get_tensor(name).to(device) for name in names}
                bound |= bound_weights(config, tensors, rank)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build it again") from None
    head, embedding = "lm_head.weight", "transformer.vocab_embedding.weight"
    if config.tie_word_embeddings and torch.equal(bound[head], bound[embedding]):
        bound[head] = bound[embedding]  # one copy in memory
    return bound


def _modules(names: list[str]) -> Iterator[list[str]]:
    """A rank file's names, those of a module together."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    yield from modules.values()
