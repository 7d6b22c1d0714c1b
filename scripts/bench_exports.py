"""What each form of `--format hf` loses on held-out prose, and the bytes of its linears.

    python scripts/bench_exports.py [MODEL] [--forms nvfp4,mxfp8] [--folder DIR ...] [--windows N]
                                    [--peer PYTHON modelopt:NVFP4_DEFAULT_CFG ...]

Each form is built by `enginehouse-build --format hf` in a process of its own, read back with
`--dequantize`, and run in float32 with what enters each linear rounded as the form's kernel rounds
it (benches/exported.py). KL is the mean over all tokens from the source in float32; the texts and
windows are bench_quality.py's. --folder: a checkpoint that is there already. --peer: another
quantiser's own (peer_export.py), in the Python that has it, of the same weights and calibration
ids.
`mixed:6` is `mixed` of 6 effective bits.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import enginehouse.runtime  # noqa: F401  before torch: it says how torch's threads wait

# isort: split
import torch
from tokenizers import Tokenizer

from enginehouse.build.quantize.calibration import calibration_sequences
from enginehouse.build.quantize.reference import fast_products
from enginehouse.build.resolve.resolve import resolve_source

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_quality import ROOT, heldout, write_for_transformers  # noqa: E402
from benches.exported import Loss, measure, states_of  # noqa: E402

CALIBRATION = (16, 512)  # sequences, of so many tokens at most: a build's own
FORMS = "none,mxfp8,fp8,fp8_rowwise,fp8_block,mixed:6,w4a16_nvfp4,nvfp4"


def build(form: str, model: str | None, folder: Path) -> None:
    """A checkpoint of the form, `mixed:6` or `fp8`, in a process of its own."""
    quant, _, bits = form.partition(":")
    command = [str(Path(sys.executable).with_name("enginehouse-build"))]
    command += [model] if model else []
    command += ["--format", "hf", "--quant", quant, "-o", str(folder), "--dtype", "bfloat16"]
    command += ["--effective-bits", bits] if bits else []
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def export(form: str, python: str, model: Path, folder: Path) -> None:
    """Another quantiser's checkpoint, from its own Python; with the tokenizer: not all write it."""
    script = Path(__file__).with_name("peer_export.py")
    subprocess.run([python, script, model, form, folder], check=True, stdout=subprocess.DEVNULL)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)


def perplexity(loss: Loss, *texts: str) -> float:
    chosen = [loss.nll[text] for text in texts or loss.nll]
    return math.exp(sum(nll for nll, _ in chosen) / sum(tokens for _, tokens in chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="without it, the sample model")
    parser.add_argument("--forms", default=FORMS)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("PYTHON", "FORM"))
    parser.add_argument("--windows", type=int, help="of each text, at most; without it, all")
    args = parser.parse_args()
    source = resolve_source(args.model, ROOT / ".cache", lambda line: None)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source.write_tokenizer(work)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        texts = heldout(tokenizer, source.bos_token_id).items()
        windows = {text: part[: args.windows] for text, part in texts}
        with torch.inference_mode(), fast_products():
            truth = states_of(source, windows, None)
        print("".join(f"{title:>12}" for title in ("all", *windows, "KL", "MB")), "form")
        folders = {form: work / form.replace(":", "-") for form in args.forms.split(",") if form}
        peers = {form: python for python, form in args.peer}
        if peers:
            ids = calibration_sequences(work, *CALIBRATION, source.bos_token_id)
            write_for_transformers(source, work, ids, windows)
        folders |= {form: work / form.replace(":", "-") for form in peers}
        for form, folder in {**folders, **{path.name: path for path in args.folder}}.items():
            if form in peers:
                export(form, peers[form], work, folder)
            elif form in folders:
                build(form, args.model, folder)
            loss = measure(folder, source, truth, windows)
            numbers = [perplexity(loss), *(perplexity(loss, text) for text in windows)]
            row = "".join(f"{number:12.2f}" for number in numbers)
            print(f"{row}{loss.mean_kl:12.4f}{loss.num_bytes / 1e6:12.1f} {form}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
