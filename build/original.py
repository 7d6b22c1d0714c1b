"""The original as transformers loads it: a reference that shares no line with our readers.

The whole model is held in float32. Needs transformers, which a build does without otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.errors import EngineError, PlanError

_BYTES_PER_PARAMETER = 4
_REMEDY = "leave verify_with out"


def check_original(source: SourceCheckpoint, num_parameters: int) -> str:
    """What it will take, in words; PlanError when transformers is not here, has nothing to load or
    no room for it.
    """
    if importlib.util.find_spec("transformers") is None:
        raise PlanError(
            "verify_with=transformers needs transformers, which is not installed: pip install "
            f"'transformers>=5' accelerate, or {_REMEDY}"
        )
    if source.kind == "tensorrt_llm":
        raise PlanError(
            f"verify_with=transformers has no original to load: {source.path} is a TensorRT-LLM "
            f"checkpoint; {_REMEDY}"
        )
    needed, free = num_parameters * _BYTES_PER_PARAMETER, psutil.virtual_memory().available
    if needed > free:
        raise PlanError(
            f"verify_with=transformers holds {source.name} in float32, {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free: {_REMEDY}, or verify where there is room"
        )
    return f"verify: transformers will hold {source.name} in float32, {needed / 2**30:.1f} GiB"


def original_logits(source: SourceCheckpoint, ids: Tensor) -> Tensor:
    """float32 [tokens, vocab_size] after each of int64 [tokens], the text read at once.

    Raises EngineError when transformers cannot load the checkpoint, or not all of it.
    """
    transformers: Any = importlib.import_module("transformers")  # slow, and rarely asked for
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where: Mapping[str, Any] = {"pretrained_model_name_or_path": source.path}
    if source.kind == "gguf":
        where = {
            "pretrained_model_name_or_path": source.path.parent,
            "gguf_file": source.path.name,
        }
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except (ImportError, ValueError, OSError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(
            f"transformers cannot load {source.path} to verify with: {reason}; {_REMEDY}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise EngineError(
            f"transformers finds no {missing[0]} in {source.path}, and would draw it at random: "
            f"{_REMEDY}"
        )
    narrow = {weight.dtype for weight in model.parameters() if weight.dtype.itemsize == 1}
    if narrow:
        raise EngineError(
            f"transformers holds {source.path} in {', '.join(map(str, narrow))}, not in the "
            f"float32 that it was asked for: {_REMEDY}"
        )
    for weight in model.parameters():  # what it dequantised itself may be in 16 bit
        weight.data = weight.data.float()
    with torch.inference_mode():
        logits: Tensor = model.eval()(ids[None], use_cache=False).logits[0].float()
    return logits
