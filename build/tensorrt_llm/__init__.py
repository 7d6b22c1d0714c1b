"""A TensorRT-LLM checkpoint -> rank engines: `trtllm-build` run, and the engine's answer judged.

Imports `plan/`, `convert/`, `sources/` and `forms/`. Does not import TensorRT-LLM: a child process
does. Read `builder.py` first, then `stages.py`.
"""
