""".gguf files, as llama.cpp's converter makes them of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from enginehouse.build.source import SourceCheckpoint

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
PERMUTED = ("llama", "granite")  # those that the converter's LlamaModel is the base of
Edit = Callable[[gguf.GGUFWriter], None]


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's own formula, in convert_hf_to_gguf.py, `LlamaModel.permute`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


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
    if family in PERMUTED:
        heads = config["num_attention_heads"]
        writer.add_rope_dimension_count(head_dim or config["hidden_size"] // heads)
    elif head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    if family == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
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

    for name in source.tensors.infos:
        data = source.tensors.read(name).float().numpy()
        module, _, part = name.rpartition(".")
        block, number, short = "", "", module
        if module.startswith("model.layers."):
            number, _, short = module.removeprefix("model.layers.").partition(".")
            block = f"blk.{number}."
        if family in PERMUTED and short.endswith(("q_proj", "k_proj")):
            count = "num_attention_heads" if short.endswith("q_proj") else "num_key_value_heads"
            data = permute(data, config[count])
        as_f32 = data.ndim == 1
        stored = gguf.GGMLQuantizationType.F32 if as_f32 else kind
        packed = gguf.quantize(np.ascontiguousarray(data), stored)
        writer.add_tensor(f"{block}{NAMES[short]}.{part}", packed, raw_dtype=stored)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
