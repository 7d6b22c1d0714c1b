"""What each arithmetic of the compiled CPU backend costs in quality: docs/quality.md.

    python scripts/bench_arithmetics.py ENGINE [--windows 5]

The engine's rank files are run by torch in float32, and by the kernels with activations in bytes
and in bfloat16, on the beginnings of the held-out texts (tests/data), in windows of 256 tokens. The
4-bit weights are the same everywhere: what is left is the rounding of activations, and of the head.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import enginehouse.runtime  # noqa: F401  before torch: it says how torch's threads wait

# isort: split
import torch
from tokenizers import Tokenizer
from torch import Tensor

from enginehouse.build.verify import kl_divergence
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.cpu.executor import CpuRunner, text_logits
from enginehouse.runtime.cpu.packed_file import PACKED
from enginehouse.runtime.cpu.packing import pack_engine
from enginehouse.runtime.cpu.support import ACTIVATIONS
from enginehouse.runtime.engine import Engine, read_engine
from enginehouse.runtime.executor import ExecutorOptions
from enginehouse.runtime.torch.decoder import Decoder, causal_attention

TEXTS = sorted((Path(__file__).parents[1] / "tests" / "data").glob("heldout_*.txt"))
WINDOW = 256


def windows_of(engine: Engine, count: int) -> list[Tensor]:
    """The first windows of each text: int64 [WINDOW] each."""
    tokenizer = Tokenizer.from_file(str(engine.path / "tokenizer.json"))
    found = []
    for text in TEXTS:
        ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")).ids)
        found += list(ids[: count * WINDOW].split(WINDOW))
    return found


def logits_of_torch(engine: Engine, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    model = Decoder(engine.config, CheckpointWeights(engine.path, engine.config), dtype, WINDOW)
    positions = torch.arange(WINDOW)

    def logits(ids: Tensor) -> Tensor:
        hidden = model.hidden_states(ids, positions[: len(ids)], causal_attention)
        return model.logits(hidden).float()

    return logits


def logits_of_kernels(engine: Engine, activations: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """Those of weights that are packed for these activations, in a folder of their own."""
    path = folder / activations
    path.mkdir()
    pack_engine(engine.path, engine.config, WINDOW, activations, path / PACKED)
    options = ExecutorOptions(max_seq_len=WINDOW, max_batch_size=1)
    runner = CpuRunner(replace(engine, path=path), options)
    return lambda ids: torch.from_numpy(text_logits(runner, ids.tolist()))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--windows", type=int, default=5, help="of each text")
    args = parser.parse_args()
    engine = read_engine(args.engine)
    windows = windows_of(engine, args.windows)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"torch in float32": logits_of_torch(engine, torch.float32)}
        contenders["torch in bfloat16"] = logits_of_torch(engine, torch.bfloat16)
        for activations in ACTIVATIONS:
            contenders[activations] = logits_of_kernels(engine, activations, Path(folder))
        truth = [contenders["torch in float32"](ids) for ids in windows]
        print(f"{len(windows)} windows of {WINDOW} tokens")
        print("| | mean KL, nats | largest | same best token | perplexity |")
        print("| --- | --- | --- | --- | --- |")
        for name, logits_of in contenders.items():
            found = [logits_of(ids) for ids in windows]
            kl = torch.cat([kl_divergence(*pair) for pair in zip(truth, found, strict=True)])
            same = torch.cat(
                [a.argmax(-1) == b.argmax(-1) for a, b in zip(truth, found, strict=True)]
            )
            losses = torch.cat(
                [
                    torch.nn.functional.cross_entropy(rows[:-1], ids[1:], reduction="none")
                    for rows, ids in zip(found, windows, strict=True)
                ]
            )
            print(
                f"| {name} | {kl.mean():.5f} | {kl.max():.3f} | {same.float().mean():.1%} "
                f"| {math.exp(losses.mean()):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
