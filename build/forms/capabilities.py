"""Which GPU can run what: (quant, SM, KV cache dtype) -> runs, or the reason why not.

Knows no tensor. The first facts are TensorRT-LLM 1.2.1's; where its kernels are known to answer
wrongly, the combination counts as one that does not run. The others are the compiler's of
TensorRT-RTX 1.7: what it was seen to refuse.
Source: NVIDIA/TensorRT-LLM issues 1113, 9253, 1547, pull request 11561; CUDA compute capabilities;
TensorRT-RTX 1.7.1's compiler (tests/build/tensorrt/test_compile.py), TensorRT 11.1's guide on
devices.
"""

from __future__ import annotations

from collections.abc import Iterable

from enginehouse.build.forms.weight_forms import (
    EXPORT_CONFIGS,
    FP8_FORMS,
    KV_CACHE_ALGOS,
    QUANT_CONFIGS,
)
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.tensorrt.package import RTX_SMS

# Streaming multiprocessor architecture: 89 is compute capability 8.9.
GPU_SM = {
    **dict.fromkeys(("a30", "a100"), 80),
    **dict.fromkeys(("a10", "a10g", "a40", "rtx3090"), 86),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx4090", "rtx6000ada"), 89),
    **dict.fromkeys(("h20", "h100", "h200", "gh200"), 90),
    **dict.fromkeys(("b200", "gb200"), 100),
    **dict.fromkeys(("b300", "gb300"), 103),
    **dict.fromkeys(("rtx5090", "rtxpro6000"), 120),
    "gb10": 121,
}
_MIXED_LAYOUT = "TensorRT-LLM 1.2.1 lays weight-only weights out wrongly above SM90"
_ANY = 1 << 30
# quant: the lowest and the highest SM, why not below, why not above.
_RANGES = {
    "none": (80, _ANY, "bfloat16 needs SM80", ""),
    "fp8": (89, _ANY, "FP8 products need SM89", ""),
    "fp8_rowwise": (89, 90, "FP8 products need SM89", "its row-wise kernel is for SM89 and SM90"),
    "int4": (80, 90, "its kernel needs SM80", _MIXED_LAYOUT),
    "int4_awq": (80, 90, "its kernel needs SM80", _MIXED_LAYOUT),
    "w4a8_awq": (89, 90, "FP8 activations need SM89", "its kernel is for SM89 and SM90"),
    "int8": (80, 90, "its kernel needs SM80", _MIXED_LAYOUT),
    "nvfp4": (100, _ANY, "NVFP4 products need SM100", ""),
    "w4a16_nvfp4": (80, _ANY, "its kernel needs SM80", ""),
    "mxfp8": (80, _ANY, "its kernel needs SM80", ""),
    "fp8_block": (89, _ANY, "FP8 products need SM89", ""),
    "mixed": (89, _ANY, "FP8 products need SM89", ""),
}


def refusal(quant: str, sm: int, kv_cache_dtype: str) -> str | None:
    """Why a GPU of this SM cannot run the combination, or None when it can."""
    low, high, below, above = _RANGES[quant]
    if sm < low:
        return below
    if sm > high:
        return above
    return kv_refusal(quant, kv_cache_dtype)


def lays_out_wrongly(quant: str, sm: int) -> bool:
    """Whether an engine may load here and answer wrongly, which only its answer can tell."""
    _, high, _, above = _RANGES[quant]
    return sm > high and above is _MIXED_LAYOUT


def kv_refusal(quant: str, kv_cache_dtype: str) -> str | None:
    """Why no GPU runs this KV cache dtype with these weights, or None."""
    if kv_cache_dtype == "fp8" and quant not in FP8_FORMS:
        if quant == "fp8_block":
            return "what runtimes read of blocks of FP8 has no word for an FP8 KV cache"
        if quant in EXPORT_CONFIGS:
            return None
        return "an FP8 KV cache needs FP8 weights (paged context FMHA has no other kernel)"
    return None


def alternatives(
    sm: int, kv_cache_dtype: str, quants: Iterable[str] = tuple(QUANT_CONFIGS)
) -> list[str]:
    """The forms among `quants` that this SM runs with this KV cache."""
    return [quant for quant in quants if refusal(quant, sm, kv_cache_dtype) is None]


def check_gpu(
    gpu: str,
    quant: str,
    kv_cache_dtype: str,
    *,
    own: bool = False,
    quants: Iterable[str] = tuple(QUANT_CONFIGS),
    kv_cache_dtypes: Iterable[str] = tuple(KV_CACHE_ALGOS),
) -> None:
    """PlanError when the named GPU cannot run the form; names what it can, among those given.

    own: the form is the source's and cannot be chosen, but the GPU can.
    """
    sm = GPU_SM[gpu]
    reason = refusal(quant, sm, kv_cache_dtype)
    if reason is None:
        return
    forms = [] if own else alternatives(sm, kv_cache_dtype, quants)
    kinds = [kind for kind in kv_cache_dtypes if refusal(quant, sm, kind) is None]
    remedies = [f"quant among {', '.join(forms)}"] if forms else []
    remedies += [f"kv_cache_dtype among {', '.join(kinds)}"] if kinds else []
    if not remedies and own:
        others = [name for name, sm in GPU_SM.items() if refusal(quant, sm, "auto") is None]
        remedies = [f"gpu among {', '.join(others)}", "the unquantised checkpoint"]
    elif not remedies:
        forms = alternatives(sm, "auto", quants)
        remedies = [f"kv_cache_dtype=auto with quant among {', '.join(forms)}"]
    raise PlanError(
        f"quant={quant} with kv_cache_dtype={kv_cache_dtype} does not run on {gpu} (SM{sm}): "
        f"{reason}; choose {', or '.join(remedies)}"
    )


# What only the data-centre package (tensorrt 11) compiles for, on such a GPU.
DATA_CENTRE_SMS = (90, 100, 103)
# The lowest SM of each form that TensorRT-RTX compiles, with no GPU present.
_RTX_LOWEST = {
    "none": (75, ""),
    "int8": (75, ""),
    "int4": (80, "INT4 weights need SM80"),
    "int4_awq": (80, "INT4 weights need SM80"),
    "fp8": (89, "FP8 products need SM89"),
    "fp8_rowwise": (89, "FP8 products need SM89"),
}
_RTX_TURING = {
    "bfloat16": "bfloat16 needs SM80, choose dtype=float16",
    "float32": "TensorRT-RTX has no float32 products below SM80, choose dtype=float16",
}


def tensorrt_package(sm: int) -> str:
    """The package that compiles for this SM: tensorrt_rtx on any machine, tensorrt on the GPU's."""
    return "tensorrt_rtx" if sm in RTX_SMS else "tensorrt"


def tensorrt_refusal(quant: str, dtype: str, sm: int, tp: int = 1) -> str | None:
    """Why backend=tensorrt has no engine of this form for the SM, or None when it has."""
    if sm not in RTX_SMS + DATA_CENTRE_SMS:
        return f"TensorRT has no target SM{sm}"
    if quant not in _RTX_LOWEST:
        return f"TensorRT's network has no {quant}"
    lowest, reason = _RTX_LOWEST[quant]
    if sm < lowest:
        return reason
    if sm < 80 and tp > 1:
        return "TensorRT's collectives need SM80"
    return _RTX_TURING.get(dtype) if sm < 80 else None
