"""A folder -> a source checkpoint: directories, quantised ones, TensorRT-LLM's.

Imports `forms/`, `families/` and `hf_keys/`. Does not know where a model was found, nor what a
build makes of a source; the contract that every source keeps is `build/source.py`. Read
`hf_checkpoint.py` first.
"""
