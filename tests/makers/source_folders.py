"""A folder of each kind of source, of one tiny model, for tests that damage their copies."""

from __future__ import annotations

from pathlib import Path

from enginehouse.build.resolve.resolve import resolve_source
from makers.bitsandbytes_writer import BITSANDBYTES
from makers.engines import write_tiny_checkpoint
from makers.gguf_writer import write_gguf
from makers.quantized_writers import KINDS, write_quantized

_QUANTIZED = {
    "gptq": "gptq v2",
    "fp8": "modelopt fp8",
    "awq": "modelopt int4 awq",
    "ct": "compressed-tensors fp8 static",
    "nf4": "nf4 nested",
}
_KINDS = {**KINDS, **BITSANDBYTES}


def write_sources(root: Path) -> Path:
    """single, sharded, gguf, gptq, fp8, awq, ct, nf4: each a folder of root. Returns single's."""
    sizes = dict(hidden=128, heads=4, kv_heads=2, intermediate=128)
    whole = write_tiny_checkpoint(root / "single", **sizes)
    write_tiny_checkpoint(root / "sharded", shards=3, **sizes)
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "x.gguf", resolve_source(str(whole), whole))
    for name, kind in _QUANTIZED.items():
        quantized, _ = write_quantized(kind, root / f"{name}-pair", kinds=_KINDS)
        quantized.rename(root / name)
    return whole
