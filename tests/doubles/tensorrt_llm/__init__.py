"""A strict double of TensorRT-LLM's Python API; see the README beside this package."""

from importlib.metadata import version

from tensorrt_llm.llmapi import SamplingParams
from tensorrt_llm.pytorch_llm import LLM

__version__ = version("tensorrt_llm")
__all__ = ["LLM", "SamplingParams", "__version__"]
