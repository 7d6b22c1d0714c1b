"""A .gguf file as a source: Hugging Face's names, row order and config.

Of some families llama.cpp interleaves the rows of q and k for its rope: they are put back in
Hugging Face's order. How the file is laid out is file.py's, what each family has of its own
families.py's; this file does not know what is made of the tensors.
Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from enginehouse.build.gguf.families import FAMILIES, NAMES, NEUTRAL, GgufFamily
from enginehouse.build.gguf.file import (
    FloatArray,
    GgufFile,
    GgufTensor,
    read_gguf,
    read_rows,
)
from enginehouse.build.gguf.tokenizer import (
    check_vocabulary,
    eos_token_ids,
    write_tokenizer,
)
from enginehouse.build.source import SourceCheckpoint, TensorInfo
from enginehouse.runtime.errors import CheckpointError


def _hf_name(name: str, names: Mapping[str, str]) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None if unknown."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None or found.group(2) not in names:
        return None
    layer = f"model.layers.{found.group(1)}." if found.group(1) else ""
    return f"{layer}{names[found.group(2)]}.{found.group(3)}"


class GgufSource:
    """The file's tensors under Hugging Face names, dequantised to float32."""

    def __init__(self, file: GgufFile, family: GgufFamily, head_dim: int) -> None:
        self._path = file.path
        self._interleaves = family.interleaves
        self._head_dim = head_dim
        self._tensors: dict[str, GgufTensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        names = {**NAMES, **family.names}
        for name, tensor in file.tensors.items():
            target = _hf_name(name, names)
            if target is not None:
                self._tensors[target] = tensor
                self._infos[target] = TensorInfo(torch.float32, tensor.shape)
            elif name != "rope_freqs.weight":  # it is in the config's rope_scaling
                raise CheckpointError(
                    f"{file.path} holds tensor {name!r}, which no plain "
                    f"{family.model_type} model has (a mixture of experts?); give its Hugging Face "
                    "directory"
                )

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no tensor {name!r}")
        tensor = self._tensors[name]
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        if len(tensor.shape) == 1:  # one row of the file, whose elements are the rows asked for
            vector = read_rows(self._path, name, tensor, 0, num_rows).reshape(tensor.shape)
            permuted = _unpermute(vector, self._head_dim) if self._is_permuted(name) else vector
            return torch.from_numpy(permuted[rows] if rows is not None else permuted)
        start, stop, step = (rows or slice(None)).indices(num_rows)
        assert step == 1, "rows are read in one piece"
        stop = max(start, stop)
        if not self._is_permuted(name):
            return torch.from_numpy(read_rows(self._path, name, tensor, start, stop))
        head = self._head_dim  # rows move within a head only: read the heads they lie in
        first = start // head * head
        heads = read_rows(self._path, name, tensor, first, -(-stop // head) * head)
        return torch.from_numpy(_unpermute(heads, head)[start - first : stop - first])

    def _is_permuted(self, name: str) -> bool:
        return self._interleaves and (".q_proj." in name or ".k_proj." in name)


def _unpermute(heads: FloatArray, head_dim: int) -> FloatArray:
    """Undo llama.cpp's row order within each head: pairs (2i, 2i+1) back to (i, i + d/2)."""
    pairs = heads.reshape(-1, head_dim // 2, 2, *heads.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(heads.shape)


def open_gguf(path: Path) -> SourceCheckpoint:
    """Open a .gguf file of one of FAMILIES; no weight is read.

    Raises CheckpointError for damage, another family, and what config.json cannot express.
    """
    file = read_gguf(path)
    check_vocabulary(file)
    family = _family_of(file)
    config = _hf_config(file, family)
    metadata = file.metadata
    return SourceCheckpoint(
        name=path.stem,
        kind="gguf",
        path=path,
        config=config,
        tensors=GgufSource(file, family, config["head_dim"]),
        files=(path,),
        eos_token_ids=eos_token_ids(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        license=metadata.get("general.license"),
        tokenizer_writer=partial(write_tokenizer, file),
    )


def _family_of(file: GgufFile) -> GgufFamily:
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file.path} has general.architecture {name!r}; from .gguf files only "
            f"{', '.join(FAMILIES)} are read (llama: Mistral and SmolLM2 too): give the model's "
            "Hugging Face directory"
        )
    return FAMILIES[name]


def _hf_config(file: GgufFile, family: GgufFamily) -> dict[str, Any]:
    """Hugging Face's config.json for the file, every key written out."""
    metadata, tensors = file.metadata, file.tensors

    def number(key: str, default: float | None = None) -> Any:
        value = file.of_model(key, default)
        if not isinstance(value, (int, float)) or value <= 0:
            found = "no" if value is None else f"{value!r} as"
            raise CheckpointError(
                f"{file.path} has {found} {file.key(key)}; wanted one number above 0"
            )
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number(
        "attention.key_length", file.of_model("rope.dimension_count", hidden // heads)
    )
    rope_dim = number("rope.dimension_count", head_dim)
    if rope_dim != head_dim or number("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path} has rope.dimension_count={rope_dim}, attention.key_length={head_dim}; "
            "wanted them and value_length equal"
        )
    _check_neutral(file, family, head_dim, number("context_length"))
    if "token_embd.weight" not in tensors:
        raise CheckpointError(
            f"{file.path} has no tensor 'token_embd.weight'; download the file again"
        )
    tokens, rows = metadata.get("tokenizer.ggml.tokens", ()), tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, but its model's embedding ends after {rows}; "
            "give the model's Hugging Face directory, its embedding resized"
        )
    epsilon = number("attention.layer_norm_rms_epsilon")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _plain(epsilon),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
        **{word: _plain(number(key)) for key, word in family.keys.items()},
        **family.config,
    }


def _plain(number: float) -> float:
    """As it was before it was a float32: 9.99999975e-06 was 1e-05."""
    return float(str(np.float32(number)))


def _check_neutral(file: GgufFile, family: GgufFamily, head_dim: int, context: int) -> None:
    """CheckpointError naming the first key whose value would make another model of it."""
    known = NEUTRAL | {"attention.scale": (0, head_dim**-0.5)}
    for key, values in known.items():
        found = None if key in family.keys else file.of_model(key)
        if found is not None and not any(_close(found, value) for value in values):
            raise CheckpointError(
                f"{file.path} has {file.key(key)}={found!r}, which no config.json of a "
                f"{family.model_type} can say; wanted {values[-1]!r} or none: give the model's "
                "Hugging Face directory"
            )
    window = file.of_model("attention.sliding_window")
    if window and window < context:
        raise CheckpointError(
            f"{file.path} has {file.key('attention.sliding_window')}={window!r}, which no "
            f"{family.model_type} has; give the model's Hugging Face directory"
        )


def _close(found: Any, value: float) -> bool:
    """Whether a number of a file, which is a float32, is this one."""
    return isinstance(found, (int, float)) and math.isclose(found, value, rel_tol=1e-6)


def _rope_scaling(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face's words; None where the file scales nothing.

    llama.cpp stretches by `factor` unless the type says none, and multiplies cos and sin by
    `attn_factor`, under yarn times 1 + ln(factor) / 10.
    """
    prefix = file.key("rope.scaling.")
    found = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    kind = found.get("type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{file.path} has {prefix}type {kind!r}; wanted none, linear or yarn: "
            "give the model's Hugging Face directory"
        )
    factor = found.get("factor", file.of_model("rope.scale_linear")) or 1.0
    magnitude = found.get("attn_factor", found.get("yarn_attn_factor")) or 1.0
    stretched = kind != "none" and factor != 1.0
    if magnitude != 1.0 and not (stretched and kind == "yarn"):
        raise CheckpointError(
            f"{file.path} has {prefix}attn_factor={magnitude:g} without yarn, for which "
            "config.json has no word; give the model's Hugging Face directory"
        )
    llama3 = _llama3_scaling(file, head_dim) if "rope_freqs.weight" in file.tensors else None
    if llama3 is not None and stretched:
        raise CheckpointError(
            f"{file.path} has rope_freqs.weight and a {prefix}factor of {factor:g}; "
            "wanted one of the two: give the model's Hugging Face directory"
        )
    if not stretched:
        return llama3
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    known = {
        "original_max_position_embeddings": found.get("original_context_length"),
        "beta_fast": found.get("yarn_beta_fast"),
        "beta_slow": found.get("yarn_beta_slow"),
        "attention_factor": magnitude * (1 + 0.1 * math.log(factor)) if magnitude != 1.0 else None,
    }
    given = {key: value for key, value in known.items() if value}
    return {"rope_type": "yarn", "factor": factor, **given}


def llama3_frequency_factors(
    head_dim: int, theta: float, factor: float, original: int
) -> FloatArray:
    """What llama.cpp stores as rope_freqs for Llama 3.1's scaling (low 1, high 4), float64."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
    middle = 1 / ((1 - smooth) / factor + smooth)
    far = np.where(wavelength > original, factor, middle)
    return np.where(wavelength < original / 4.0, 1.0, far)


def _llama3_scaling(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    """The rope_scaling whose frequency factors are the file's; CheckpointError if none is."""
    tensor = file.tensors["rope_freqs.weight"]
    count = tensor.shape[-1]
    found = np.fromfile(file.path, np.float32, count, offset=tensor.offset)
    if tensor.kind == gguf.GGMLQuantizationType.F32 and found.shape == (head_dim // 2,):
        if (found == 1.0).all():
            return None
        theta, factor = file.of_model("rope.freq_base", 10000.0), float(found.max())
        for original in (8192, 4096, 16384, 32768):
            wanted = llama3_frequency_factors(head_dim, theta, factor, original)
            if np.allclose(found, wanted, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
    raise CheckpointError(
        f"{file.path} has rope_freqs.weight that no Llama 3.1 scaling gives; "
        "give the model's Hugging Face directory"
    )
