"""A TensorRT-LLM checkpoint -> rank engines: `trtllm-build` run, and the engine's answer judged.

Imports `plan/`, `convert/`, `sources/`, `forms/` and `verify.py`. Does not import TensorRT-LLM: a
child process does. Read `builder.py` first, then `compile.py`.
"""
