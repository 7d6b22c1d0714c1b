"""A TensorRT-LLM checkpoint folder as a source: merged over its ranks, cut again by whoever asks.

Ours, ModelOpt's or the convert scripts', of any TP and PP. No value is touched: packed nibbles
and scales pass as they are. This file does not know how an engine is cut (sharding.py is asked).
Source: TensorRT-LLM 1.2.1 checkpoint format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from enginehouse.build.families.architectures import recipe_of, stage_rows
from enginehouse.build.families.output_table import output_tensors
from enginehouse.build.families.row_orders import reordered, reorders
from enginehouse.build.families.shapes import expected_shapes
from enginehouse.build.forms.exclude import excluded_patterns
from enginehouse.build.forms.quantization import check_finite
from enginehouse.build.forms.quantized_linear import QuantizedForm
from enginehouse.build.forms.weight_forms import OutputTensor
from enginehouse.build.hf_keys.config_values import read_json
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.build.sources.folder import Folder, as_folder
from enginehouse.build.sources.quantized_source import is_decoder_linear
from enginehouse.build.sources.safetensors_file import (
    SafetensorsTensor,
    read_safetensors_header,
    read_tensor,
)
from enginehouse.build.sources.tokenizer_files import (
    copy_tokenizer,
    special_token_ids,
    tokenizer_files,
)
from enginehouse.runtime.checkpoint.packing import dequantize_fp8, dequantize_int4
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.config import Mapping as RankMapping
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.errors import CheckpointError, EngineError

_KV_SCALES = ("kv_cache_scaling_factor", "k_cache_scaling_factor", "v_cache_scaling_factor")
_EMBEDDING = "transformer.vocab_embedding."
_TIED = ("tie_word_embeddings", "share_embedding_table")
# quant_algo and the form that it is.
_FORMS = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_rowwise",
    "W4A16_AWQ": "int4_awq",  # or int4, without pre_quant_scale
    "W4A8_AWQ": "w4a8_awq",
    "W8A16": "int8",
}
_READABLE = "null, " + ", ".join(_FORMS)
_UNQUANTISED = "convert the Hugging Face checkpoint instead"


def is_trtllm_checkpoint(path: Path) -> bool:
    """Whether a directory's config.json is TensorRT-LLM's, of a checkpoint or of an engine."""
    if not (path / "config.json").is_file():
        return False
    config = read_json(path / "config.json")
    return "pretrained_config" in config or ("architecture" in config and "dtype" in config)


def open_trtllm(where: Path | Folder) -> SourceCheckpoint:
    """Open a checkpoint folder: config and headers only.

    Raises CheckpointError for a compiled engine, a missing rank, and a form that is tied to one
    kind of GPU.
    """
    folder = as_folder(where)
    path = folder.path
    data = read_json(path / "config.json")
    if "pretrained_config" in data:
        raise CheckpointError(
            f"{folder.label} is a compiled TensorRT-LLM engine, whose weights cannot be taken out; "
            "give the checkpoint folder that it was built from"
        )
    try:
        config = read_config(path)
    except (EngineError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}/config.json: {error}") from None
    if data.get("embedding_sharding_dim", 0) != 0 and config.use_parallel_embedding:
        raise CheckpointError(
            f"{path} cuts its embedding along embedding_sharding_dim="
            f"{data['embedding_sharding_dim']}; wanted 0: {_UNQUANTISED}"
        )
    experts_cut = (data.get("mapping") or {}).get("moe_ep_size", 1)
    if config.num_experts and experts_cut not in (None, -1, 1):
        raise CheckpointError(
            f"{path} spreads its experts over ranks (moe_ep_size={experts_cut}); wanted each "
            f"expert cut over all ranks (moe_tp_size=tp_size): {_UNQUANTISED}"
        )
    ranks = [path / f"rank{rank}.safetensors" for rank in range(config.mapping.world_size)]
    for rank in ranks:
        if rank.name not in folder.names:
            raise CheckpointError(
                f"{folder.label} has no {rank.name}; config.json says tp_size="
                f"{config.mapping.tp_size}, pp_size={config.mapping.pp_size}: copy all "
                f"{len(ranks)} rank files"
            )
    headers = [read_safetensors_header(rank, folder) for rank in ranks]
    # an lm_head of its own counts, whatever the config says of it
    tied = any(data.get(key) for key in _TIED) and "lm_head.weight" not in headers[-1]
    config = replace(config, tie_word_embeddings=tied)
    tensors = TrtllmTensors(path, config, headers)
    eos, bos = special_token_ids(path, {})
    whole = replace(config.with_mapping(RankMapping()), quantization=config.quantization)
    return SourceCheckpoint(
        name=folder.name,
        kind="tensorrt_llm",
        path=path,
        config={},
        tensors=tensors,
        files=(path / "config.json", *ranks, *tokenizer_files(path)),
        eos_token_ids=eos,
        bos_token_id=bos,
        license=None,
        tokenizer_writer=lambda dest: copy_tokenizer(path, dest),
        quantized=None if config.quantization.quant_algo is None else tensors,
        rows=tensors,
        engine_config=whole,
        origin=folder.origin,
    )


class TrtllmTensors:
    """The folder's tensors by what they would be made of: rows of Hugging Face names."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        headers: Sequence[Mapping[str, SafetensorsTensor]],
    ) -> None:
        self._path = path
        self._config = config
        self._headers = headers
        self._check_form()
        self._check_complete()

    def _check_form(self) -> None:
        quantization = self._config.quantization
        algo = quantization.quant_algo
        packed = [
            name
            for name, tensor in self._headers[0].items()
            if is_decoder_linear(name) and tensor.dtype == torch.int8
        ]
        if algo == "W4A16_GPTQ" or (algo in ("W4A16", "W8A16") and packed):
            raise CheckpointError(
                f"{self._path} has quant_algo={algo}, whose weights were arranged for the kernels "
                "of one kind of GPU, or are an engine's rows of INT8, and cannot be cut again; "
                f"{_UNQUANTISED}"
            )
        if algo is not None and algo not in _FORMS:
            raise CheckpointError(
                f"{self._path} has quant_algo={algo}; wanted {_READABLE}: {_UNQUANTISED}"
            )

    def _check_complete(self) -> None:
        """Every tensor of the model is there, on each rank of its stage, in one shape."""
        mapping = self._config.mapping
        for pp_rank in range(mapping.pp_size):
            for row in stage_rows(self._config, pp_rank):
                if row.target == "lm_head.weight" and self._config.tie_word_embeddings:
                    continue  # the embedding is written out in its place
                shapes = set()
                for tp_rank in range(mapping.tp_size):
                    rank = mapping.rank(pp_rank, tp_rank)
                    if row.target not in self._headers[rank]:
                        raise CheckpointError(
                            f"{self._path}/rank{rank}.safetensors has no tensor {row.target}; do "
                            "config.json and the rank files belong together?"
                        )
                    shapes.add(self._headers[rank][row.target].shape)
                if len(shapes) > 1:
                    raise CheckpointError(
                        f"{self._path}: {row.target} has shapes "
                        f"{', '.join(str(list(shape)) for shape in sorted(shapes))} on the ranks "
                        "of one stage; wanted equal ones"
                    )
            self._check_stage(pp_rank)

    def _check_stage(self, pp_rank: int) -> None:
        """A stage's tensors are those that config.json implies, and no layer is left over. Of
        mixtures in a form without a table the plan is the judge.
        """
        config, header = self._config, self._headers[self._config.mapping.rank(pp_rank, 0)]
        count = len(config.mapping.layers(pp_rank, config.num_hidden_layers))
        extra = next((name for name in header if _local_layer(name) >= count), None)
        if extra is not None:
            raise CheckpointError(
                f"{self._path} holds {extra}, while config.json gives its stage {count} layers; "
                "do config.json and the rank files belong together?"
            )
        if config.num_experts and config.quantization.quant_algo not in (None, "FP8"):
            return
        for name, wanted in output_tensors(config, pp_rank).items():
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            if name.endswith(_KV_SCALES) or (tied and name not in header):
                continue
            if name not in header:
                raise CheckpointError(
                    f"{self._path} has no tensor {name}, which its quantization in config.json "
                    "wants; do config.json and the rank files belong together?"
                )
            self._check_tensor(name, header[name], wanted)

    def _check_tensor(self, name: str, found: SafetensorsTensor, wanted: OutputTensor) -> None:
        """Quantised or not as config.json says; of its shape, or a scale of as many elements."""
        config, shapes = self._config, [wanted.shape]
        if name.startswith(_EMBEDDING) and not config.use_parallel_embedding:
            rows = (config.vocab_size, config.padded_vocab_size())
            shapes = [(count, config.hidden_size) for count in rows]
        what = ""
        if (found.dtype.itemsize == 1) != (wanted.dtype in ("int8", "float8_e4m3fn")):
            what = f"dtype {found.dtype}; config.json implies {wanted.dtype}"
        elif found.shape not in shapes and (
            name.endswith((".weight", ".bias")) or prod(found.shape) != prod(wanted.shape)
        ):
            what = f"shape {list(found.shape)}; config.json implies {list(shapes[0])} on each rank"
        if what:
            raise CheckpointError(
                f"{self._path}: {name} has {what}: do config.json and the rank files belong "
                "together?"
            )

    @cached_property
    def _targets(self) -> dict[tuple[str, ...], str]:
        """Each row's tensor, layers counted through the model, by its sources."""
        whole = replace(self._config, mapping=RankMapping(), tie_word_embeddings=False)
        return {row.sources: row.target for row in stage_rows(whole, 0)}

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the folder's tensors stand for, under Hugging Face's names."""
        dtype: torch.dtype = getattr(torch, self._config.dtype)
        shapes = expected_shapes(replace(self._config, mapping=RankMapping()))
        return {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One source's rows out of the fused tensor that holds them."""
        sources = next((key for key in self._targets if name in key), None)
        if sources is None:
            raise CheckpointError(f"{self._path} has nothing that was made of {name!r}")
        sizes = [self.infos[source].shape[0] for source in sources]
        part: Tensor = self._unfused(sources).split(sizes)[sources.index(name)]
        return part if rows is None else part[rows]

    def _unfused(self, sources: Sequence[str]) -> Tensor:
        """A row before its recipe: the sources one below the other."""
        row, recipe = self.read_row(sources), recipe_of(self._config, sources)
        if recipe == "experts":
            return row.flatten(0, 1)
        if reorders(recipe):
            row = reordered(self._config, recipe, row, back=True)
            return row.view(self.infos[sources[0]].shape) if recipe == "qkv_by_heads" else row
        if recipe == "stacked_halves":
            return row.roll(row.shape[1] // 2, dims=1)
        if recipe not in ("join", "flat", "stacked", "plus_one"):
            raise CheckpointError(
                f"{self._path} does not hold {sources[0]} as it was; give the model's Hugging Face "
                "directory"
            )
        return row.float() - 1 if recipe == "plus_one" else row

    def read_row(self, sources: Sequence[str]) -> Tensor:
        """The whole tensor in its own dtype; a quantised linear dequantised, in float32."""
        target = self._targets[tuple(sources)]
        module, _, kind = target.rpartition(".")
        if target in ("transformer.vocab_embedding.weight", "lm_head.weight"):
            return self._vocabulary(module)
        tensors = self._module(module)
        if not is_decoder_linear(target) or tensors["weight"].dtype.itemsize > 1:
            return tensors[kind]  # never quantised, or excluded
        weight, scale = tensors["weight"], tensors.get("weights_scaling_factor")
        if weight.dtype == torch.float8_e4m3fn:
            rows = tensors.get("per_channel_scale", scale)
            assert rows is not None
            return dequantize_fp8(weight, rows)
        assert scale is not None
        values = dequantize_int4(weight, scale, tensors.get("zero"))
        factor = tensors.get("prequant_scaling_factor")
        return values if factor is None else values * factor.float()

    def form(self, config: ModelConfig) -> QuantizedForm:
        """The folder's own form."""
        quantization = replace(self._config.quantization, kv_cache_quant_algo=None)
        patterns = quantization.exclude_modules or ()
        stages = self._config.mapping.pp_size
        if config.mapping.pp_size != stages and any("layers" in pattern for pattern in patterns):
            general = [pattern for pattern in patterns if "layers" not in pattern]
            patterns = (*general, *excluded_patterns(self._excluded(), config))
            quantization = replace(quantization, exclude_modules=patterns)
        quant = _FORMS[str(quantization.quant_algo)]
        if quant not in ("int4_awq", "w4a8_awq"):
            return QuantizedForm(quant, quantization)
        if not quantization.pre_quant_scale:
            quant = "int4"
        scales = (t for n, t in self._headers[0].items() if n.endswith("weights_scaling_factor"))
        dtypes = {tensor.dtype for tensor in scales}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return QuantizedForm(quant, quantization, str(dtype).removeprefix("torch."))

    def _excluded(self) -> list[str]:
        """The linears that stay unquantised, layers counted through the model."""
        mapping, found = self._config.mapping, []
        for pp_rank in range(mapping.pp_size):
            first = mapping.layers(pp_rank, self._config.num_hidden_layers).start
            for row in stage_rows(self._config, pp_rank):
                module = row.target.removesuffix(".weight")
                if is_decoder_linear(row.target) and self._config.quantization.excludes(module):
                    head, layers, local, name = module.split(".", 3)
                    found.append(f"{head}.{layers}.{first + int(local)}.{name}")
        return found

    def kv_scales(self, config: ModelConfig) -> dict[int, float]:
        """Of each layer, the largest that its stage's first rank holds; none of an INT8 cache."""
        mapping, scales = self._config.mapping, {}
        if self._config.quantization.kv_cache_quant_algo != "FP8":
            return {}
        for pp_rank in range(mapping.pp_size):
            header = self._headers[mapping.rank(pp_rank, 0)]
            layers = mapping.layers(pp_rank, self._config.num_hidden_layers)
            for local, layer in enumerate(layers):
                names = (f"transformer.layers.{local}.attention.{name}" for name in _KV_SCALES)
                found = [float(read_tensor(header[name])) for name in names if name in header]
                if found:
                    scales[layer] = max(found)
        return scales

    def engine_tensors(self, sources: Sequence[str], config: ModelConfig) -> dict[str, Tensor]:
        """The linear's own tensors, merged over the ranks."""
        module = self._targets[tuple(sources)].removesuffix(".weight")
        tensors = self._module(module)
        tensors.pop("bias", None)
        scale_dtype = self.form(config).scale_dtype
        if scale_dtype is not None:
            name = "weights_scaling_factor"
            tensors[name] = tensors[name].to(getattr(torch, scale_dtype))
        dtype: torch.dtype = getattr(torch, config.dtype)
        for name, tensor in tensors.items():
            check_finite(f"{module}.{name}", tensor)
        for name in ("zero", "prequant_scaling_factor"):
            if name in tensors:
                tensors[name] = _in_dtype(f"{module}.{name}", tensors[name], dtype)
        return tensors

    def _module(self, module: str) -> dict[str, Tensor]:
        try:
            tensors = self._weights(module + ".")
        except EngineError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        algo = self._config.quantization.quant_algo
        weight = tensors.get("weight")
        if algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN") and weight is not None:
            if weight.dtype == torch.int8:
                tensors["weight"] = weight.view(torch.float8_e4m3fn)
        return tensors

    @cached_property
    def _weights(self) -> CheckpointWeights:
        # int8's weights are not quantised yet: its loader would, and so would CheckpointWeights
        quantization = self._config.quantization
        if quantization.quant_algo == "W8A16":
            quantization = replace(quantization, quant_algo=None)
        try:
            return CheckpointWeights(self._path, replace(self._config, quantization=quantization))
        except EngineError as error:
            raise CheckpointError(f"{self._path}: {error}") from None

    def _vocabulary(self, module: str) -> Tensor:
        """Embedding or lm_head without the rows that fill it up."""
        if module != "lm_head" and not self._config.use_parallel_embedding:
            weight = read_tensor(self._headers[0][f"{module}.weight"])  # whole on every rank
        else:
            weight = self._module(module)["weight"]
        return weight[: self._config.vocab_size]


def _local_layer(name: str) -> int:
    """The layer a tensor belongs to, counted within its stage; -1 for none."""
    words = name.split(".", 3)
    return int(words[2]) if words[1:2] == ["layers"] and words[2].isdecimal() else -1


def _in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as the loader casts it."""
    found = tensor.to(dtype)
    if not torch.isfinite(found).all():
        raise CheckpointError(f"{name} holds values that {dtype} cannot")
    return found
