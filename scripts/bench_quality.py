"""Perplexity of every form on held-out prose, beside nvidia-modelopt's where that is installed.

    python scripts/bench_quality.py MODEL [--forms none,int4,...] [--modelopt /venv/bin/python]

Each form is built as `enginehouse-build` builds it, in a process of its own, and its rank file is
read back and run by the torch backend in float32; time and peak memory are that process's.
modelopt runs in the Python given to it, on the same weights, with the same calibration texts; its
quantised model is evaluated with transformers in float32. Perplexity is over windows of 512
tokens of text that is not calibration text.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).parents[1]
TEXTS = sorted((ROOT / "tests" / "data").glob("heldout_*.txt"))
WINDOW = 512
FORMS = ("none", "fp8", "fp8_rowwise", "int8", "int4", "int4_awq")

MODELOPT = """
import copy, json, math, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import modelopt.torch.quantization as mtq
from torch.nn import functional
from transformers import AutoModelForCausalLM
path, form, group_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
data = torch.load(path + "/data.pt")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
config = copy.deepcopy(getattr(mtq, form))
def regroup(node):
    if isinstance(node, dict):
        sizes = node.get("block_sizes")
        if isinstance(sizes, dict) and sizes.get(-1) == 128:
            sizes[-1] = group_size
        node = node.values()
    if isinstance(node, str):
        return
    try:
        for item in node:
            regroup(item)
    except TypeError:
        pass
regroup(config)
def calibrate(m):
    with torch.inference_mode():
        for ids in data["calibration"]:
            m(ids.unsqueeze(0))
start = time.perf_counter()
model = mtq.quantize(model, config, calibrate)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nll = {}
with torch.inference_mode():
    for name, windows in data["heldout"].items():
        total = sum(
            float(functional.cross_entropy(model(ids.unsqueeze(0)).logits[0, :-1].float(), ids[1:],
                                           reduction="sum"))
            for ids in windows
        )
        nll[name] = [total, sum(len(ids) - 1 for ids in windows)]
print("RESULT " + json.dumps({"seconds": seconds, "peak_kib": peak, "nll": nll}))
"""


def heldout(tokenizer: Tokenizer, first_token: int | None) -> dict[str, list[Tensor]]:
    """Each text as whole windows of WINDOW ids, the first of them the model's BOS."""
    head = [] if first_token is None else [first_token]
    body = WINDOW - len(head)
    windows = {}
    for path in TEXTS:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        starts = range(0, len(ids) - body + 1, body)
        windows[path.stem] = [torch.tensor(head + ids[start : start + body]) for start in starts]
    return windows


def engine_nll(engine_dir: Path, windows: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """Negative log-likelihood and tokens of each text, through the engine's own linears."""
    from enginehouse.runtime.attention import PagedKVCache
    from enginehouse.runtime.engine import read_config
    from enginehouse.runtime.model import PREFIX, Decoder, causal_attention
    from enginehouse.runtime.weights import CheckpointWeights

    config = read_config(engine_dir)
    weights = CheckpointWeights(engine_dir, config)
    model = Decoder(config, weights, torch.float32, WINDOW)
    scales = []
    if config.quantization.kv_cache_quant_algo is not None:
        for layer in range(config.num_hidden_layers):
            name = PREFIX.format(layer) + "attention.kv_cache_scaling_factor"
            scales.append(float(weights(name)[""]))
    cache = PagedKVCache(config, 1, 16, torch.float32, scales)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(layer, q, cache.round_trip(layer, k), cache.round_trip(layer, v))

    result = {}
    for name, sequences in windows.items():
        total = 0.0
        for ids in sequences:
            hidden = model.hidden_states(ids, torch.arange(len(ids)), attend)
            logits = model.logits(hidden[:-1])
            total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        result[name] = [total, float(sum(len(ids) - 1 for ids in sequences))]
    return result


def build_form(model: str, form: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build one form in a child process; its seconds, peak memory and likelihoods."""
    quant, _, kv_cache_dtype = form.partition("+kv_")
    out = work / form
    flags = [model, "-o", str(out), "--quant", quant, "--until", "convert", "--quiet"]
    flags += ["--calib-samples", str(args.samples), "--calib-length", str(args.length)]
    flags += ["--kv-cache-dtype", kv_cache_dtype or "auto"]
    if quant in ("int4", "int4_awq"):
        flags += ["--group-size", str(args.group_size)]
    script = (
        "import resource, sys, torch\n"
        "from enginehouse.build import cli\n"
        f"torch.set_num_threads({args.threads})\n"
        "status = cli.main(sys.argv[1:])\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(status)\n"
    )
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", script, *flags], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    peak = int(run.stdout.split()[-1])
    return {"seconds": seconds, "peak_kib": peak, "nll": engine_nll(out, args.windows)}


def run_modelopt(form: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The same weights and texts through modelopt, in its own Python."""
    threads = str(args.threads)
    command = [args.modelopt, "-c", MODELOPT, str(work), form, str(args.group_size), threads]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"modelopt failed:\n{run.stderr[-2000:]}")
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def write_model(source: Any, work: Path) -> None:
    """The source as transformers reads it: config.json and float32 safetensors."""
    from safetensors.torch import save_file

    config = {**source.config, "torch_dtype": "float32"}
    (work / "config.json").write_text(json.dumps(config))
    tensors = {name: source.tensors.read(name).float() for name in source.tensors.infos}
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})


def report(name: str, result: dict[str, Any]) -> None:
    totals = list(result["nll"].values())
    whole = math.exp(sum(t for t, _ in totals) / sum(n for _, n in totals))
    each = "  ".join(f"{math.exp(t / n):8.2f}" for t, n in totals)
    print(
        f"{name:24} {whole:8.2f}  {each}  {result['seconds']:7.1f} s "
        f"{result['peak_kib'] / 2**20:6.2f} GiB",
        flush=True,
    )


def main() -> None:
    from enginehouse.build.calibration import calibration_sequences
    from enginehouse.build.sources import resolve_source

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="directory or .gguf file")
    parser.add_argument("--forms", default=",".join(FORMS), help="fp8+kv_fp8 has an FP8 KV cache")
    parser.add_argument("--modelopt", help="Python of a venv with nvidia-modelopt, transformers")
    parser.add_argument("--modelopt-forms", default="FP8_DEFAULT_CFG,INT4_AWQ_CFG")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = resolve_source(args.model, ROOT / ".cache", lambda line: None)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source.write_tokenizer(work)
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        args.windows = heldout(tokenizer, source.bos_token_id)
        sizes = {text: sum(map(len, windows)) for text, windows in args.windows.items()}
        print(f"{'form':24} {'all':>8}  {'  '.join(f'{text[8:]:>8}' for text in sizes)}   {sizes}")
        for form in filter(None, args.forms.split(",")):
            report(form, build_form(args.model, form, args, work))
        if args.modelopt:
            calibration = calibration_sequences(
                work, args.samples, args.length, source.bos_token_id
            )
            torch.save({"calibration": calibration, "heldout": args.windows}, work / "data.pt")
            write_model(source, work)
            for form in args.modelopt_forms.split(","):
                report(f"modelopt {form}", run_modelopt(form, args, work))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


if __name__ == "__main__":
    main()
