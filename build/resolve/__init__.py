"""What the user named -> one source checkpoint, made plain: the sample, folders, files, hub ids.

Imports `sources/`, `dequantize/`, `gguf/`, `families/` and `hf_keys/`. Does not know how a file is
laid out, nor what a build makes of a source; the contract that every source keeps is
`build/source.py`. Read `resolve.py` first.
"""
