""".gguf files, as llama.cpp's converter makes them of a Hugging Face directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from enginehouse.build.source import SourceCheckpoint

PERMUTED = ("llama", "granite", "smollm3")  # those that the converter's LlamaModel is the base of
Edit = Callable[[gguf.GGUFWriter], None]


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's own formula, in convert_hf_to_gguf.py, `LlamaModel.permute`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_family(writer: gguf.GGUFWriter, family: str, config: dict[str, Any]) -> None:
    """The keys that the converter's class of the family adds."""
    rope = config.get("rope_parameters") or config
    if family == "stablelm":
        writer.add_parallel_residual(config.get("use_parallel_residual", True))
    if family == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family in ("cohere2", "command-r"):
        writer.add_logit_scale(config["logit_scale"])
    if family in ("gemma2", "gemma3", "phi3", "cohere2", "exaone4") and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    if family == "exaone4" and config["sliding_window"]:
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        writer.add_sliding_window_pattern(slides)
    if family == "gemma3" and (factor := rope["full_attention"].get("factor")):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    if family == "gpt-oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if family == "qwen3moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if family == "phi3" and rope["rope_type"] == "longrope":
        original, context = (
            config["original_max_position_embeddings"],
            config["max_position_embeddings"],
        )
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = math.log(context / original) / math.log(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + scale))
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)


def _with_experts_stacked(source: SourceCheckpoint) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor, those of experts joined under the names that the converter gives them."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    experts: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for name in source.tensors.infos:
        data = source.tensors.read(name).float().numpy()
        found = re.fullmatch(r"model\.(layers\.\d+)\.(\w+)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            made[name] = data
            continue
        layer, block, number, which = found.groups()
        place = f"model.{layer}.mlp" if block == "mlp" else f"{layer}.feed_forward"
        experts.setdefault(f"{place}.experts.{which}.weight", {})[int(number)] = data
    for name, each in experts.items():
        made[name] = np.stack([each[number] for number in sorted(each)])
    return made


def _of_gpt_oss(tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The converter's GptOssModel: experts turned, gate and up apart, names as of linears."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    for name, data in tensors.items():
        if name.endswith("sinks"):
            made[f"{name}.weight"] = data
        elif name.endswith("down_proj_bias"):
            made[name.replace("_proj_bias", "_proj.bias")] = data
        elif name.endswith("gate_up_proj_bias"):
            for number, short in enumerate(("gate", "up")):
                made[name.replace("gate_up_proj_bias", f"{short}_proj.bias")] = data[..., number::2]
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = data.swapaxes(1, 2)
        elif name.endswith("experts.gate_up_proj"):
            for number, short in enumerate(("gate", "up")):
                place = name.replace("gate_up_proj", f"{short}_proj.weight")
                made[place] = data.swapaxes(1, 2)[:, number::2]
        else:
            made[name] = data
    return made


def write_gguf(
    path: Path,
    source: SourceCheckpoint,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    family: str = "llama",
    pre: str | None = "gpt-2",
    edit: Edit = lambda writer: None,
) -> Path:
    """What llama.cpp's converter makes of a Hugging Face directory."""
    config = source.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim")
    rope = config.get("rope_parameters") or config
    rope = rope.get("full_attention", rope)
    if family in PERMUTED or family in ("phi3", "stablelm"):
        usual = config["hidden_size"] // config["num_attention_heads"]
        turned = int((head_dim or usual) * rope.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(turned)
    elif head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    _add_family(writer, family, config)
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["norm_epsilon"])
    writer.add_license("apache-2.0")

    tokenizer = json.loads((source.path / "tokenizer.json").read_text())
    tokens = [""] * len(tokenizer["model"]["vocab"])
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number] = token
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ '<|im_start|>' }}{{ messages }}{{ '<|endoftext|>' }}<|im_end|>")

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(family)
    names = gguf.get_tensor_name_map(arch or gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = _with_experts_stacked(source)
    for name, data in (_of_gpt_oss(tensors) if family == "gpt-oss" else tensors).items():
        if family in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            count = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            data = permute(data, config[count])
        if family.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        as_f32 = data.ndim == 1
        stored = gguf.GGMLQuantizationType.F32 if as_f32 else kind
        packed = gguf.quantize(np.ascontiguousarray(data), stored)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, packed, raw_dtype=stored)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
