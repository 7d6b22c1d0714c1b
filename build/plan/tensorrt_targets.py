"""What backend=tensorrt can make of a plan, and for which GPUs: settled before a weight is read.

Knows no compiler: what it refuses stands in `forms/capabilities.py`, and the network's own limits
here.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from enginehouse.build.forms.capabilities import (
    GPU_SM,
    tensorrt_package,
    tensorrt_refusal,
)
from enginehouse.build.forms.weight_forms import QUANT_CONFIGS
from enginehouse.build.plan.settings import BuildSettings
from enginehouse.runtime.checkpoint.traits import beyond_tensorrt
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.errors import PlanError
from enginehouse.runtime.tensorrt.package import RTX_SMS

# Compiled for where neither gpu nor sm is given: more targets in a plan cost next to nothing.
_DEFAULT_SMS = (80, 86, 89, 120)


def check_tensorrt(settings: BuildSettings, config: ModelConfig) -> tuple[int, ...]:
    """The SMs to compile for, lowest first; none for other backends.

    config: with mapping and quantization. Raises PlanError for what the network or a target lacks.
    """
    if settings.backend != "tensorrt":
        if settings.sm is not None:
            raise PlanError(f"sm={settings.sm} is of no use with backend={settings.backend}")
        for name in ("bake_weights", "plan_layers"):
            if getattr(settings, name):
                raise PlanError(f"{name} is of no use with backend={settings.backend}")
        return ()
    reason = _network_refusal(settings, config)
    if reason is not None:
        raise PlanError(f"backend=tensorrt: {reason}")
    quant, dtype, tp = settings.quant, config.dtype, config.mapping.tp_size
    asked = _asked(settings)
    if asked is None:
        return tuple(sm for sm in _DEFAULT_SMS if tensorrt_refusal(quant, dtype, sm, tp) is None)
    for sm in asked:
        reason = tensorrt_refusal(quant, dtype, sm, tp)
        if reason is not None:
            raise PlanError(_refused(settings, dtype, tp, sm, reason))
    if len(asked) > 1 and not set(asked) <= set(RTX_SMS):
        raise PlanError(
            f"sm={settings.sm}: {_others(asked)} only by tensorrt, one at a time and on such a "
            "GPU; build an engine for each"
        )
    return asked


def _others(sms: tuple[int, ...]) -> str:
    names = [f"SM{sm}" for sm in sms if sm not in RTX_SMS]
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} compiled"


def _refused(settings: BuildSettings, dtype: str, tp: int, sm: int, reason: str) -> str:
    where = f"{settings.gpu} (SM{sm})" if settings.sm is None else f"SM{sm}"
    sentence = f"backend=tensorrt with quant={settings.quant} does not run on {where}: {reason}"
    forms = [q for q in QUANT_CONFIGS if tensorrt_refusal(q, dtype, sm, tp) is None]
    return f"{sentence}; choose quant among {', '.join(forms)}" if forms else sentence


def _network_refusal(settings: BuildSettings, config: ModelConfig) -> str | None:
    """Why no network of ours has this model in this form, or None."""
    quantization = config.quantization
    if (beyond := beyond_tensorrt(config)) is not None:
        return (
            f"its network does not do {beyond}, which {config.architecture} has; choose "
            "backend=cpu or torch"
        )
    if settings.quant == "w4a8_awq":
        return "its network has no INT4 weights with FP8 activations; choose quant=int4_awq or fp8"
    if quantization.has_zero_point:
        return (
            "TensorRT's INT4 is symmetric and the source has zero points; choose backend=torch or "
            "tensorrt_llm, or a source without them"
        )
    if quantization.kv_cache_quant_algo is not None:
        kind = quantization.kv_cache_quant_algo
        return f"TensorRT's KV cache is never {kind}; choose kv_cache_dtype=auto"
    if config.mapping.pp_size > 1:
        return f"pp={config.mapping.pp_size}: its network is not cut by layers; choose pp=1 and tp"
    return None


def _asked(settings: BuildSettings) -> tuple[int, ...] | None:
    """The SMs that sm or gpu names; None where neither is given."""
    if settings.sm is None:
        return None if settings.gpu is None else (GPU_SM[settings.gpu],)
    if settings.gpu is not None:
        raise PlanError(f"gpu={settings.gpu} and sm={settings.sm}: one of them names the targets")
    try:
        return tuple(
            sorted({int(word.strip().removeprefix("SM")) for word in settings.sm.split(",")})
        )
    except ValueError:
        known = ",".join(map(str, RTX_SMS))
        raise PlanError(f"sm={settings.sm!r} is no list of SMs; wanted some of {known}") from None


def print_targets(dtype: str, console: Console) -> None:
    """Which package compiles for which GPU, and the forms that it takes in this dtype."""
    titles = ("SM", "GPUs", "package", "compiles on", f"forms in {dtype}")
    table = Table(*titles, box=None, pad_edge=False)
    for sm in sorted({*GPU_SM.values(), *RTX_SMS}):
        gpus = ", ".join(gpu for gpu, its in GPU_SM.items() if its == sm)
        forms = [quant for quant in QUANT_CONFIGS if tensorrt_refusal(quant, dtype, sm) is None]
        package = tensorrt_package(sm)
        where = "any machine" if package == "tensorrt_rtx" else "such a GPU"
        table.add_row(str(sm), gpus, package, where, ", ".join(forms) or "none")
    console.print(table)
