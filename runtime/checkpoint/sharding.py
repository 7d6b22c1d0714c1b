"""Where each tensor of a TensorRT-LLM checkpoint is cut over tensor-parallel ranks.

`shard_tensor` takes the slice of one rank, `merge_tensors` is its exact inverse. Both work on
whatever the tensor holds (weights, packed nibbles, scales): only names and shapes count here.
Source: TensorRT-LLM 1.2.1 checkpoint format, tensor names and tensor-parallel splits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import EngineError


class Cut(enum.Enum):
    """How a tensor is spread over the ranks."""

    COPY = "copy"  # every rank holds all of it
    ROWS = "rows"  # dim 0, in equal parts
    HALVES = "halves"  # the rows of up and the rows of gate, each in equal parts
    COLUMNS = "columns"  # the last dim, in equal parts
    QKV = "qkv"  # dim 0: the rank's q rows, its k rows, its v rows
    VOCABULARY = "vocabulary"  # dim 0, padded with zero rows to a multiple of tp
    FIRST_RANK = "first rank"  # all of it on tp_rank 0, zeros elsewhere: an all-reduce adds it up


_FUSED = (".mlp.fc.", ".mlp.shared_expert.fc.")  # of a model with gate_in_fc: up, then gate
_MODULE_CUTS = {
    "vocab_embedding": Cut.VOCABULARY,
    "per_layer_embedding": Cut.VOCABULARY,
    "lm_head": Cut.VOCABULARY,
    "qkv": Cut.QKV,
    **dict.fromkeys(("q", "q_b", "kv_b"), Cut.ROWS),  # of latent attention, heads one by one
    **dict.fromkeys(("in_qkvz", "in_ba", "conv1d"), Cut.ROWS),  # of linear attention, likewise
    "fc": Cut.ROWS,
    "gate": Cut.ROWS,
    "dense": Cut.COLUMNS,
    "proj": Cut.COLUMNS,
}


def tensor_cut(name: str, ndim: int) -> Cut:
    """The cut of a checkpoint tensor: `transformer.layers.3.attention.qkv.weight` -> Cut.QKV."""
    *_, module, parameter = ["", *name.split(".")]
    cut = _MODULE_CUTS.get(module, Cut.COPY)
    if parameter in ("sinks", "A_log", "dt_bias"):  # a number for each head
        return Cut.ROWS
    if parameter in ("activation_scaling_factor", "weights_scaling_factor_2"):
        return Cut.COPY
    if parameter == "weights_scaling_factor" and ndim == 1:
        return Cut.COPY  # one FP8 scale for the whole tensor
    if parameter == "prequant_scaling_factor":  # one per input channel
        return Cut.ROWS if cut is Cut.COLUMNS else Cut.COPY
    if cut is Cut.COLUMNS:
        if parameter == "bias":
            return Cut.FIRST_RANK
        if ndim == 1:  # a scale per output channel, which this cut leaves whole
            return Cut.COPY
    return cut


def config_cut(name: str, ndim: int, config: ModelConfig) -> Cut:
    """`tensor_cut` for a model that keeps up and gate in one mlp.fc, or has experts.

    Expert tensors have a leading dim of experts, which every rank holds; a scale [experts, 1]
    is one FP8 scale for each of them, and of [experts, out] one for each output.
    """
    cut = tensor_cut(name, ndim)
    if config.num_experts and ".mlp." in name:
        of_tensors = config.quantization.quant_algo == "FP8"
        if of_tensors and name.endswith("weights_scaling_factor"):
            return Cut.COPY
        if cut is Cut.COLUMNS and name.endswith("per_channel_scale"):
            return Cut.COPY
    if config.gate_in_fc and cut is Cut.ROWS and any(module in name for module in _FUSED):
        return Cut.HALVES
    return cut


def config_of(name: str, config: ModelConfig, pp_rank: int) -> ModelConfig:
    """The model as the layer of a stage's tensor has it, for what cuts and merges that tensor."""
    if ".layers." not in name:
        return config
    local = int(name.split(".layers.")[1].partition(".")[0])
    layers = config.mapping.layers(pp_rank, config.num_hidden_layers)
    return config.of_layer(layers[local])


def kv_heads_of_rank(config: ModelConfig, tp_rank: int) -> range:
    """The global key/value heads of a rank; several ranks hold a head when tp exceeds them."""
    tp, heads = config.mapping.tp_size, config.num_key_value_heads
    if tp <= heads:
        per_rank = heads // tp
        return range(tp_rank * per_rank, (tp_rank + 1) * per_rank)
    head = tp_rank * heads // tp
    return range(head, head + 1)


def _scale_of(name: str) -> str:
    """INT4 zeros are [groups, out]: their transpose is cut as the scales [out, groups] are."""
    return name.removesuffix("zero") + "weights_scaling_factor"


def _unit(rows: int, size: int, name: str) -> int:
    """Rows of the model per row of the tensor: 2 for packed nibbles, else 1."""
    unit, rest = divmod(size, rows)
    if rest or unit not in (1, 2):
        raise EngineError(f"{name} has {rows} rows; wanted {size}, or {size // 2} packed")
    return unit


def _rows_dim(name: str, tensor: Tensor) -> int:
    """The dim of output rows: the last of what has one number for each, else the one before."""
    last = name.endswith((".bias", ".per_channel_scale"))
    return tensor.ndim - 1 if last else max(0, tensor.ndim - 2)


def _check_divisible(name: str, what: str, size: int, tp: int) -> None:
    if size % tp:
        raise EngineError(f"{name}: {size} {what} cannot be cut over tp={tp}")


def shard_tensor(name: str, tensor: Tensor, config: ModelConfig, tp_rank: int) -> Tensor:
    """The part of `tensor` that rank `tp_rank` of a stage holds; a view where that is possible.

    tensor: as it would be for tp=1, q, k and v already fused. Raises EngineError when the
    tensor's size is no multiple of what the cut needs.
    """
    tp = config.mapping.tp_size
    if name.endswith(".zero"):
        return shard_tensor(_scale_of(name), tensor.mT, config, tp_rank).mT.contiguous()
    cut = config_cut(name, tensor.ndim, config)
    if tp == 1 or cut is Cut.COPY:
        return tensor
    if cut is Cut.FIRST_RANK:
        return tensor if tp_rank == 0 else torch.zeros_like(tensor)
    if cut is Cut.COLUMNS:
        _check_divisible(name, "columns", tensor.shape[-1], tp)
        return tensor.chunk(tp, dim=-1)[tp_rank]
    dim = _rows_dim(name, tensor) if cut is Cut.HALVES else 0
    runs = _row_runs(name, cut, tensor.shape[dim], config, tp_rank)
    parts = [tensor.narrow(dim, run.start, len(run)) for run in runs]
    padding = _padding(cut, tensor.shape[0], runs, tp)
    if padding:
        parts.append(tensor.new_zeros(padding, *tensor.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def shard_piece(
    name: str,
    piece: Tensor,
    first_row: int,
    shape: Sequence[int],
    config: ModelConfig,
    tp_rank: int,
) -> Tensor:
    """What a rank holds of some rows of a tensor; of all pieces in order, its `shard_tensor`.

    piece: rows first_row and on of a tensor of this shape, of two dimensions unless it is whole.
    """
    tp = config.mapping.tp_size
    if len(piece) == shape[0]:
        return shard_tensor(name, piece, config, tp_rank)
    cut = config_cut(name, len(shape), config)
    assert len(shape) == 2 and not name.endswith(".zero"), (name, shape)
    if tp == 1 or cut in (Cut.COPY, Cut.COLUMNS, Cut.FIRST_RANK):
        return shard_tensor(name, piece, config, tp_rank)
    runs = _row_runs(name, cut, shape[0], config, tp_rank)
    end = first_row + len(piece)
    bounds = [(max(run.start, first_row), min(run.stop, end)) for run in runs]
    parts = [piece[a - first_row : b - first_row] for a, b in bounds if a < b]
    if end == shape[0] and (padding := _padding(cut, shape[0], runs, tp)):
        parts.append(piece.new_zeros(padding, shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat([*parts, piece[:0]])


def _row_runs(name: str, cut: Cut, rows: int, config: ModelConfig, tp_rank: int) -> list[range]:
    """The rows of a tensor that a rank holds, in the order it holds them, which is theirs."""
    tp = config.mapping.tp_size
    if cut is Cut.VOCABULARY:
        per_rank = -(-rows // tp)
        return [range(min(rows, tp_rank * per_rank), min(rows, (tp_rank + 1) * per_rank))]
    if cut is Cut.QKV:
        unit = _unit(rows, config.qkv_size, name)
        head, query = config.head_size // unit, config.query_size // unit
        q_heads = config.num_attention_heads // tp
        kv_heads = kv_heads_of_rank(config, tp_rank)
        k_start = config.num_attention_heads * query
        v_start = k_start + config.num_key_value_heads * head
        count = len(kv_heads) * head
        return [
            range(tp_rank * q_heads * query, (tp_rank + 1) * q_heads * query),
            *(
                range(start + kv_heads.start * head, start + kv_heads.start * head + count)
                for start in (k_start, v_start)
            ),
        ]
    halves = 2 if cut is Cut.HALVES else 1
    _check_divisible(name, "rows", rows, halves * tp)
    part = rows // (halves * tp)
    starts = [(half * tp + tp_rank) * part for half in range(halves)]
    return [range(start, start + part) for start in starts]


def _padding(cut: Cut, rows: int, runs: Sequence[range], tp: int) -> int:
    """Rows of zeros that a rank holds beyond those of the vocabulary."""
    return -(-rows // tp) - len(runs[0]) if cut is Cut.VOCABULARY else 0


def merge_tensors(name: str, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """The whole tensor again from the parts of tp_rank 0, 1, ...: the inverse of `shard_tensor`.

    Raises EngineError when copies that must be equal are not.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if name.endswith(".zero"):
        scales = [part.mT for part in parts]
        return merge_tensors(_scale_of(name), scales, config).mT.contiguous()
    cut = config_cut(name, first.ndim, config)
    if cut is Cut.COPY:
        for rank, part in enumerate(parts[1:], start=1):
            if not torch.equal(_comparable(part), _comparable(first)):
                raise EngineError(
                    f"{name} differs between tp_rank 0 and {rank}; wanted equal copies"
                )
        return first
    if cut is Cut.FIRST_RANK:
        return first
    if cut is Cut.COLUMNS:
        return torch.cat(list(parts), dim=-1)
    if cut is Cut.HALVES:
        dim = _rows_dim(name, first)
        halves = [part.chunk(2, dim=dim) for part in parts]
        return torch.cat([half[i] for i in (0, 1) for half in halves], dim=dim)
    if cut is Cut.VOCABULARY:
        per_layer = "per_layer_embedding" in name
        rows = config.extra["per_layer_vocab_size"] if per_layer else config.vocab_size
        return torch.cat(list(parts))[:rows]
    if cut is Cut.QKV:
        return _merge_qkv(name, parts, config)
    return torch.cat(list(parts))


def _merge_qkv(name: str, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    tp = config.mapping.tp_size
    q_heads = config.num_attention_heads // tp
    kv_heads = len(kv_heads_of_rank(config, 0))
    rank_rows = q_heads * config.query_size + 2 * kv_heads * config.head_size
    unit = _unit(parts[0].shape[0], rank_rows, name)
    head, query = config.head_size // unit, config.query_size // unit
    q: list[Tensor] = []
    k: dict[int, Tensor] = {}
    v: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        part_q, part_k, part_v = part.split([q_heads * query, kv_heads * head, kv_heads * head])
        q.append(part_q)
        for i, kv_head in enumerate(kv_heads_of_rank(config, rank)):
            k.setdefault(kv_head, part_k[i * head : (i + 1) * head])
            v.setdefault(kv_head, part_v[i * head : (i + 1) * head])
    order = range(config.num_key_value_heads)
    return torch.cat([*q, *(k[i] for i in order), *(v[i] for i in order)])


def _comparable(tensor: Tensor) -> Tensor:
    """Its bytes: float8 has no equality of its own, and NaN none with itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)
