"""Perplexity of every form on held-out prose, beside nvidia-modelopt's where that is installed.

    python scripts/bench_quality.py [MODEL] [--forms none,int4,...] [--modelopt /venv/bin/python]

Each form is built by `enginehouse-build --until convert` in a process of its own, and its rank
file is read back and run by the torch backend in float32. modelopt runs in the Python given to it
(scripts/modelopt_quality.py), on the same weights and the same calibration ids, in groups of the
same size, with lm_head unquantised as here; its model is evaluated with transformers in float32.
Perplexity is over windows of 512 tokens of text that is not calibration text.

Seconds are those of a whole process, from its start until the weights are quantised (ours: until
they are written); for modelopt, those of mtq.quantize alone stand beside them. CPU seconds, of all
threads, depend less on what else the machine does. Peak memory is that of the same time. A run of
more than --limit seconds is killed and reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import enginehouse.runtime  # noqa: F401  before torch: it says how torch's threads wait

# isort: split
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from enginehouse.build.quantize.calibration import calibration_sequences
from enginehouse.build.resolve.resolve import resolve_source
from enginehouse.build.source import SourceCheckpoint
from enginehouse.runtime.checkpoint.packing import dequantize_int4
from enginehouse.runtime.checkpoint.traits import AttentionRule
from enginehouse.runtime.checkpoint.weights import CheckpointWeights
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.torch.attention import PagedKVCache
from enginehouse.runtime.torch.decoder import CausalAttention, Decoder, causal_attention

ROOT = Path(__file__).parents[1]
TEXTS = sorted((ROOT / "tests" / "data").glob("heldout_*.txt"))
WINDOW = 512
FORMS = "none,fp8,fp8+kv_fp8,fp8_rowwise,int8,int4,int4_awq,w4a8_awq"
MODELOPT_FORMS = "none,FP8_DEFAULT_CFG,INT4_AWQ_CFG"

Windows = dict[str, list[Tensor]]


class Usage(NamedTuple):
    """What a process took: wall and CPU seconds, and its peak of resident bytes."""

    seconds: float
    cpu_s: float
    peak_bytes: int


class Result(NamedTuple):
    """nll: text -> its negative log-likelihood in nats, and its tokens. quantize_s: modelopt's."""

    form: str
    usage: Usage
    nll: dict[str, tuple[float, int]]
    quantize_s: float | None = None

    def perplexity(self, *texts: str) -> float:
        """Over these texts together; over all without any."""
        chosen = [self.nll[text] for text in texts or self.nll]
        return math.exp(sum(nll for nll, _ in chosen) / sum(tokens for _, tokens in chosen))


class Failed(Exception):
    """A form that was refused, killed or broken; its last words."""


def heldout(tokenizer: Tokenizer, first_token: int | None) -> Windows:
    """Each text as whole windows of WINDOW ids, the first of them the model's BOS."""
    head = [] if first_token is None else [first_token]
    body = WINDOW - len(head)
    windows = {}
    for path in TEXTS:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        starts = range(0, len(ids) - body + 1, body)
        name = path.stem.removeprefix("heldout_")
        windows[name] = [torch.tensor(head + ids[start : start + body]) for start in starts]
    return windows


def multiplied_out(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """INT4 weights as the matrices they mean, which are faster to run on many tokens at once.

    W4A8 stays as it is: it rounds its inputs.
    """
    result = dict(tensors)
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensors[name].dtype == torch.int8:
            scale = result.get(f"{module}.weights_scaling_factor")
            if scale is None or f"{module}.weights_scaling_factor_2" in tensors:
                continue
            weight = dequantize_int4(tensors[name], scale)
            factor = result.pop(f"{module}.prequant_scaling_factor", torch.ones(1))
            del result[f"{module}.weights_scaling_factor"]
            result[name] = weight * factor.float()
    return result


@torch.inference_mode()
def engine_nll(checkpoint: Path, windows: Windows) -> dict[str, tuple[float, int]]:
    """Negative log-likelihood and tokens of each text, through the checkpoint's own linears."""
    config = read_config(checkpoint)
    weights = CheckpointWeights(checkpoint, config)
    model = Decoder(config, lambda prefix: multiplied_out(weights(prefix)), torch.float32, WINDOW)
    stored = PagedKVCache(config, 1, 16, torch.float32, weights.kv_scales()).round_trip

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        return causal_attention(layer, q, stored(layer, k), stored(layer, v), rule)

    result = {}
    # oneDNN's products: see build/quantize/reference.py
    torch.set_float32_matmul_precision("medium")
    for name, sequences in windows.items():
        total = 0.0
        for ids in sequences:
            hidden = model.hidden_states(ids, torch.arange(len(ids)), CausalAttention(attend))
            logits = model.logits(hidden[:-1])
            total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        result[name] = (total, sum(len(ids) - 1 for ids in sequences))
    return result


def run_child(command: list[str], threads: int, limit_s: float) -> tuple[str, Usage]:
    """What a command prints, and what it took; Failed unless it ends well within the limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if seconds > limit_s:
            raise Failed(f"killed after {seconds:.0f} s")
        errors.seek(0)
        output.seek(0)
        if process.returncode:
            raise Failed((errors.read().strip() or f"status {process.returncode}").split("\n")[-1])
        cpu_s = usage.ru_utime + usage.ru_stime
        return output.read(), Usage(seconds, cpu_s, usage.ru_maxrss * 1024)


def run_form(form: str, args: argparse.Namespace, work: Path, windows: Windows) -> Result:
    """Build one form, such as `fp8` or `fp8+kv_fp8`, and evaluate it."""
    quant, _, kv_cache_dtype = form.partition("+kv_")
    command = [str(Path(sys.executable).with_name("enginehouse-build"))]
    command += [args.model] if args.model else []
    command += ["-o", str(work / form), "--quant", quant, "--until", "convert", "--quiet"]
    command += ["--calib-samples", str(args.samples), "--calib-length", str(args.length)]
    command += ["--kv-cache-dtype", kv_cache_dtype or "auto"]
    if quant in ("int4", "int4_awq"):
        command += ["--group-size", str(args.group_size)]
    _, usage = run_child(command, args.threads, args.limit)
    return Result(form, usage, engine_nll(work / form, windows))


def run_modelopt(form: str, args: argparse.Namespace, work: Path) -> Result:
    """The same weights and ids through modelopt, in its own Python."""
    script = str(Path(__file__).with_name("modelopt_quality.py"))
    command = [args.modelopt, script, str(work), form, str(args.group_size), str(args.threads)]
    output, _ = run_child([*command, str(time.time())], args.threads, args.limit)
    found = json.loads(output.strip().split("\n")[-1])
    nll = {name: tuple(counts) for name, counts in found["nll"].items()}
    usage = Usage(found["whole_s"], found["cpu_s"], found["peak_kib"] * 1024)
    return Result(f"modelopt {form}", usage, nll, found["quantize_s"])


def write_for_transformers(
    source: SourceCheckpoint, work: Path, calibration: list[Tensor], windows: Windows
) -> None:
    """config.json, float32 safetensors and the ids, as modelopt_quality.py reads them."""
    from safetensors.torch import save_file

    torch.save({"calibration": calibration, "heldout": windows}, work / "data.pt")
    config = {**source.config, "torch_dtype": "float32"}
    (work / "config.json").write_text(json.dumps(config))
    tensors = {name: source.tensors.read(name).float() for name in source.tensors.infos}
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})


def print_row(result: Result) -> None:
    each = "".join(f"{result.perplexity(text):10.2f}" for text in result.nll)
    alone = "" if result.quantize_s is None else f"   mtq.quantize {result.quantize_s:.1f} s"
    print(
        f"{result.form:26}{result.perplexity():9.2f}{each}{result.usage.seconds:9.1f} s"
        f"{result.usage.cpu_s:9.1f} s{result.usage.peak_bytes / 2**20:7.0f} MiB{alone}",
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="without it, the sample model")
    parser.add_argument("--forms", default=FORMS, help="fp8+kv_fp8 has an FP8 KV cache")
    parser.add_argument("--modelopt", help="Python of a venv with nvidia-modelopt, transformers")
    parser.add_argument("--modelopt-forms", default=MODELOPT_FORMS)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=480, help="seconds after which to kill")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    source = resolve_source(args.model, ROOT / ".cache", lambda line: None)
    if source.remote is not None:
        source.remote.fetch(source.missing, lambda count: None)
    results: list[Result] = []
    failures: dict[str, str] = {}

    def attempt(form: str, run: Any, *arguments: Any) -> None:
        try:
            results.append(run(form, args, *arguments))
            print_row(results[-1])
        except Failed as failed:
            failures[form] = str(failed)
            print(f"{form:26} {failed}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source.write_tokenizer(work)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        windows = heldout(tokenizer, source.bos_token_id)
        calibration = calibration_sequences(work, args.samples, args.length, source.bos_token_id)
        sizes = ", ".join(f"{text} {sum(map(len, part))}" for text, part in windows.items())
        print(f"held out: {sizes} tokens; calibration: {sum(map(len, calibration))} tokens")
        header = "".join(f"{text:>10}" for text in windows)
        print(f"{'form':26}{'all':>9}{header}{'wall':>11}{'CPU':>11}{'peak RSS':>11}", flush=True)
        for form in filter(None, args.forms.split(",")):
            attempt(form, run_form, work, windows)
        if args.modelopt:
            write_for_transformers(source, work, calibration, windows)
            for form in args.modelopt_forms.split(","):
                attempt(form, run_modelopt, work)
    if args.json:
        rows = [
            {**result._asdict(), **result.usage._asdict(), "perplexity": result.perplexity()}
            for result in results
        ]
        args.json.write_text(json.dumps({"results": rows, "failures": failures}, indent=1) + "\n")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
