"""A .gguf file -> a source checkpoint: tensors under Hugging Face's names, config, tokenizer.

Imports `sources/` and `hf_keys/`. Does not know what a build makes of a source. Read
`checkpoint.py` first.
"""
