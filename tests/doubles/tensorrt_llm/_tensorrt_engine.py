"""tensorrt_llm._tensorrt_engine: the LLM of compiled engines, gone after 1.3.0rc20."""

from importlib.metadata import version

if version("tensorrt_llm") != "1.2.1":
    raise ModuleNotFoundError("No module named 'tensorrt_llm._tensorrt_engine'")

from tensorrt_llm.engine_llm import LLM  # noqa: E402

__all__ = ["LLM"]
