"""What an engine is bound to: TensorRT-LLM, TensorRT and the GPU's architecture.

An engine loads only where these are what they were when it was compiled, so the build records
them in the manifest and the runtime compares them before it loads anything. Imports none of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from enginehouse.runtime.errors import EngineError

LAST_RC_WITH_ENGINES = 20  # of 1.3.0; NVIDIA/TensorRT-LLM's release note of v1.3.0rc20
_BOUND = {"tensorrt_llm": "TensorRT-LLM", "tensorrt": "TensorRT", "sm": "GPUs of SM"}
_NVIDIA_SMI_S = 30


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None when there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def has_engines(trtllm_version: str) -> bool:
    """Whether this TensorRT-LLM still loads compiled engines: up to 1.3.0rc20."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?", trtllm_version)
    if numbers is None:
        return False
    major, minor, patch, candidate = (int(n) if n else None for n in numbers.groups())
    if (major, minor) != (1, 3):
        return (major, minor) < (1, 3)
    return patch == 0 and candidate is not None and candidate <= LAST_RC_WITH_ENGINES


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints, None where there is none or it fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        result = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=_NVIDIA_SMI_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def record_machine() -> dict[str, str | None]:
    """tensorrt_llm, tensorrt, cuda (the driver's), sm (`90`) and gpu of the first visible GPU.

    None stands for what is not there.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = ["-i", visible] if visible else []
    rows = nvidia_smi("--query-gpu=name,compute_cap", "--format=csv,noheader", *only)
    name, _, capability = (rows or "").strip().partition("\n")[0].rpartition(",")
    cuda = re.search(r"CUDA Version\s*:\s*([\d.]+)", nvidia_smi() or "")
    return {
        "tensorrt_llm": installed_version("tensorrt_llm"),
        "tensorrt": installed_version("tensorrt"),
        "cuda": cuda[1] if cuda else None,
        "sm": capability.strip().replace(".", "") or None,
        "gpu": name.strip() or None,
    }


def check_machine(
    recorded: Mapping[str, str | None], found: Mapping[str, str | None], rebuild_command: str
) -> None:
    """EngineError when an engine compiled on `recorded` cannot load on `found`.

    Another CUDA driver or another GPU of the same SM is no hindrance.
    """
    for key, title in _BOUND.items():
        was, now = recorded.get(key), found.get(key)
        if was != now:
            gpus = f" ({recorded.get('gpu')}, here {found.get('gpu')})" if key == "sm" else ""
            raise EngineError(
                f"the engine was compiled for {title} {was or 'unknown'} and this machine has "
                f"{now or 'none'}{gpus}; compile it here: {rebuild_command}"
            )
