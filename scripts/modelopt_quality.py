"""nvidia-modelopt's side of bench_quality.py; runs in a Python that has modelopt and transformers.

    python modelopt_quality.py FOLDER FORM GROUP_SIZE THREADS STARTED

FOLDER holds the model as transformers reads it, and data.pt: {"calibration": ids, "heldout":
{text: windows of ids}}. FORM names one of modelopt's configs, or is `none`. STARTED is the clock's
time at which the caller started this process. The last line is JSON: seconds of mtq.quantize; wall
and CPU seconds and peak KiB of everything up to its end; [nll, tokens] of each text.
"""

import copy
import json
import resource
import sys
import time
import warnings

import torch
from torch.nn import functional

warnings.simplefilter("ignore")


def with_groups(config, group_size):
    """The config with `group_size` in place of its groups of 128."""
    config = copy.deepcopy(config)
    for entry in config["quant_cfg"]:
        sizes = (entry.get("cfg") or {}).get("block_sizes")
        if sizes:
            sizes[-1] = group_size
    return config


def check(model, form, group_size):
    """Every decoder linear is quantised, in groups of that size, and nothing else is."""
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None:
            wanted = ".layers." in name
            assert quantizer.is_enabled == wanted, f"{name}: enabled is {quantizer.is_enabled}"
            if wanted and form.startswith("INT4"):
                assert quantizer.block_sizes[-1] == group_size, f"{name}: {quantizer.block_sizes}"


def main():
    folder, form, group_size, threads, started = sys.argv[1:]
    torch.set_num_threads(int(threads))
    from transformers import AutoModelForCausalLM

    data = torch.load(f"{folder}/data.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def calibrate(model):
        with torch.inference_mode():
            for ids in data["calibration"]:
                model(ids.unsqueeze(0))

    quantize_s = 0.0
    if form != "none":
        import modelopt.torch.quantization as mtq

        config = with_groups(getattr(mtq, form), int(group_size))
        start = time.perf_counter()
        model = mtq.quantize(model, config, calibrate)
        quantize_s = time.perf_counter() - start
        check(model, form, int(group_size))
    whole_s = time.time() - float(started)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
    nll = {}
    with torch.inference_mode():
        for name, windows in data["heldout"].items():
            total = 0.0
            for ids in windows:
                logits = model(ids.unsqueeze(0)).logits[0, :-1].float()
                total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
            nll[name] = [total, sum(len(ids) - 1 for ids in windows)]
    times = {"quantize_s": quantize_s, "whole_s": whole_s, "cpu_s": cpu_s}
    print("\n" + json.dumps({**times, "peak_kib": peak, "nll": nll}))


if __name__ == "__main__":
    main()
