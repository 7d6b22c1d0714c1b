"""What the user named -> a source checkpoint: directories, .gguf files, quantised ones, hub ids.

Imports `forms/` and `families/`. Does not know what a build makes of a source; the contract that
every source keeps is `build/source.py`. Read `resolve.py` first.
"""
