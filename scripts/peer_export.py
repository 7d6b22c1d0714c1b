"""Other quantisers' own checkpoints of one model; runs in a Python that has them and transformers.

    python peer_export.py FOLDER modelopt:NVFP4_DEFAULT_CFG OUT
    python peer_export.py FOLDER llmcompressor:NVFP4 OUT

FOLDER holds the model as transformers reads it, its tokenizer, and data.pt: {"calibration": ids},
which both are calibrated on. bench_exports.py --peer calls it.
"""

import sys
import warnings

import torch

warnings.simplefilter("ignore")


def modelopt(model, form, data, out):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def calibrate(model):
        with torch.inference_mode():
            for ids in data:
                model(ids.unsqueeze(0))

    quantized = mtq.quantize(model, getattr(mtq, form), calibrate)
    with torch.inference_mode():
        export_hf_checkpoint(quantized, export_dir=out)


def llmcompressor(model, form, data, out):
    """form: a preset scheme of compressed-tensors, rounded to the nearest; `GPTQ:` before it, by
    GPTQ. W4A16 has groups of 64, as this model's columns have.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    method, _, scheme = form.rpartition(":")
    chosen = {"scheme": scheme}
    if scheme == "W4A16":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        group = {"targets": ["Linear"], "weights": {**weights, "group_size": 64}}
        chosen = {"config_groups": {"group_0": group}}
    kind = GPTQModifier if method == "GPTQ" else QuantizationModifier
    recipe = kind(targets="Linear", ignore=["lm_head"], **chosen)
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in data]
    oneshot(
        model=model,
        recipe=recipe,
        dataset=Dataset.from_list(rows),
        max_seq_length=max(map(len, data)),
        num_calibration_samples=len(data),
    )
    model.save_pretrained(out, save_compressed=True)


def main():
    folder, named, out = sys.argv[1:]
    library, _, form = named.partition(":")
    from transformers import AutoModelForCausalLM

    data = torch.load(f"{folder}/data.pt")["calibration"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    {"modelopt": modelopt, "llmcompressor": llmcompressor}[library](model, form, data, out)


if __name__ == "__main__":
    main()
