"""The rope of a .gguf file in Hugging Face's words: rope_scaling, from keys and from tensors.

Knows no family. Source: llama.cpp's convert_hf_to_gguf.py and llama-model.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from enginehouse.build.gguf.file import FloatArray, GgufFile
from enginehouse.runtime.errors import CheckpointError

LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TENSORS = ("rope_freqs.weight", *LONGROPE)  # they are in the config's rope_scaling


def plain(number: float) -> float:
    """As it was before it was a float32: 9.99999975e-06 was 1e-05."""
    return float(str(np.float32(number)))


def rope_scaling(file: GgufFile, head_dim: int, context: int) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face's words; None where the file scales nothing.

    head_dim: of a head's numbers those that turn. context: tokens that the model was made for.

    llama.cpp stretches by `factor` unless the type says none, and multiplies cos and sin by
    `attn_factor`, under yarn times 1 + ln(factor) / 10.
    """
    prefix = file.key("rope.scaling.")
    found = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if LONGROPE[0] in file.tensors:
        return _longrope(file, head_dim, context)
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


def _longrope(file: GgufFile, head_dim: int, context: int) -> dict[str, Any]:
    """Phi-3's, whose factors are tensors. The magnitude is said where it is not the usual one."""
    original = file.of_model("rope.scaling.original_context_length")
    factors = []
    for name in LONGROPE:
        tensor = file.tensors.get(name)
        wanted = (gguf.GGMLQuantizationType.F32, (head_dim // 2,))
        if tensor is None or tensor[:2] != wanted or not original:
            raise CheckpointError(
                f"{file.path} has {LONGROPE[0]}; wanted {' and '.join(LONGROPE)} of "
                f"{head_dim // 2} float32 numbers and "
                f"{file.key('rope.scaling.original_context_length')}: download the file again"
            )
        found = np.fromfile(file.path, np.float32, head_dim // 2, offset=tensor.offset)
        factors.append([plain(factor) for factor in found])
    scaling = {"rope_type": "longrope", "long_factor": factors[0], "short_factor": factors[1]}
    scale = max(context / original, 1.0)
    usual = math.sqrt(1 + math.log(scale) / math.log(original))
    magnitude = file.of_model("rope.scaling.attn_factor") or usual
    if math.isclose(magnitude, usual, rel_tol=1e-6):
        return scaling
    return {**scaling, "attention_factor": plain(magnitude)}


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
