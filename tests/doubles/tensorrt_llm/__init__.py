"""A strict double of TensorRT-LLM's Python API; see the README beside this package."""

from importlib.metadata import version
from typing import Any

from tensorrt_llm.llmapi import SamplingParams

__version__ = version("tensorrt_llm")
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """LLM loads the CPU backend, which trtllm-build has no use for."""
    if name == "LLM":
        from tensorrt_llm.pytorch_llm import LLM

        return LLM
    raise AttributeError(name)
