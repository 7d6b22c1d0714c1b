"""The rank files of an engine as one model: every tensor merged over the ranks that share it.

The exact inverse of the conversion's cuts, so a checkpoint made for four GPUs can be run, and
checked, in one process. Reads one layer at a time.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.sharding import merge_tensors

_LAYERS = "transformer.layers."


class CheckpointWeights:
    """Merged tensors of a TensorRT-LLM checkpoint folder, by global layer."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.config = config
        self._ranks = []
        for rank in range(config.mapping.world_size):
            path = directory / f"rank{rank}.safetensors"
            try:
                self._ranks.append(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise EngineError(f"{path} cannot be read: {error}; build it again") from None
        self._names = [list(file.keys()) for file in self._ranks]

    def __call__(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, keyed by the rest.

        prefix: `transformer.layers.7.` (7 counts over the whole model), `lm_head.`, ...
        """
        pp_rank, local = self._locate(prefix)
        mapping = self.config.mapping
        ranks = [mapping.rank(pp_rank, tp_rank) for tp_rank in range(mapping.tp_size)]
        names = [name for name in self._names[ranks[0]] if name.startswith(local)]
        if not names:
            raise EngineError(
                f"rank{ranks[0]}.safetensors holds no tensor {prefix}*; build it again"
            )
        return {name[len(local) :]: self._merged(name, ranks) for name in names}

    def _merged(self, name: str, ranks: list[int]) -> Tensor:
        try:
            parts = [self._ranks[rank].get_tensor(name) for rank in ranks]
        except SafetensorError as error:
            raise EngineError(
                f"{name} is not in every rank file: {error}; build it again"
            ) from None
        return merge_tensors(name, parts, self.config)

    def _locate(self, prefix: str) -> tuple[int, str]:
        """The pipeline stage that holds a prefix, and the prefix with its local layer index."""
        mapping = self.config.mapping
        if not prefix.startswith(_LAYERS):
            first = prefix.startswith("transformer.vocab_embedding")
            return (0 if first else mapping.pp_size - 1), prefix
        index, _, rest = prefix[len(_LAYERS) :].partition(".")
        for pp_rank in range(mapping.pp_size):
            layers = mapping.layers(pp_rank, self.config.num_hidden_layers)
            if int(index) in layers:
                return pp_rank, f"{_LAYERS}{int(index) - layers.start}.{rest}"
        raise EngineError(f"{prefix}: the model has {self.config.num_hidden_layers} layers")
