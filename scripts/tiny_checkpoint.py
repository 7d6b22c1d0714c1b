"""Make a tiny random Llama checkpoint directory, as Hugging Face would hold one.

For tests and for trying things out: seeded weights, a byte-level BPE tokenizer trained on a
page of text that stands below, a ChatML template. Needs neither transformers nor a network.
The defaults can be cut over TP 1, 2 and 4, in INT4 with groups of 64 too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = """
The engine house stands at the end of the yard, where the line from the harbour meets the line
from the hills. In the morning the stoker lights the fire, the driver oils the rods, and the
first train of the day waits at the platform with its doors open. What is the time? It is ten
past seven, and there are 4 coaches, 96 seats and 12 passengers. A whistle, a cloud of steam,
and the wheels begin to turn: slowly, then faster, then as fast as they will go.
The user asks a question and the assistant gives an answer. The answer is short when the
question is short, and long when there is much to say. "How far is it to the sea?" asks the
child. "Thirty miles," says the guard, "and then another two on foot." They look out of the
window at the fields, the river, the bridge and the town beyond it.
def wheels(coaches: int) -> int:
    return 8 * coaches + 10  # the engine has ten of its own
"""


def write_tiny_checkpoint(
    path: Path,
    *,
    hidden: int = 256,
    layers: int = 2,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int | None = None,
    intermediate: int = 512,
    vocab: int = 512,
    max_positions: int = 2048,
    dtype: str = "bfloat16",
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    architecture: str = "LlamaForCausalLM",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write the directory and return it. Equal options give equal bytes.

    vocab: at least 259, the bytes and the special tokens. shards: above 1, with an index.
    """
    assert vocab >= 256 + len(SPECIAL_TOKENS), "the vocabulary holds every byte"
    head_dim = head_dim or hidden // heads
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0]})
    _write_weights(path, _weights(config, getattr(torch, dtype), seed), shards)
    write_tokenizer(path, vocab, max_positions)
    return path


def _weights(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Linears of unit gain, norms near one, small biases: logits of about unit variance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(dtype)

    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {"model.embed_tokens.weight": normal(vocab, hidden, scale=hidden**-0.5)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (out_features, in_features) in linears.items():
            weights[f"{prefix}{name}.weight"] = normal(
                out_features, in_features, scale=in_features**-0.5
            )
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                weights[f"{prefix}{name}.bias"] = normal(out_features, scale=0.1)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = normal(hidden, scale=0.1, mean=1.0)
    weights["model.norm.weight"] = normal(hidden, scale=0.1, mean=1.0)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(vocab, hidden, scale=hidden**-0.5)
    return weights


def _write_weights(path: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        tensors = {name: weights[name] for name in part}
        save_file(tensors, path / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def train_tokenizer(vocab: int, text: str = TEXT) -> Tokenizer:
    """Byte-level BPE of at most `vocab` tokens, the special ones first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return tokenizer


def write_tokenizer(path: Path, vocab: int, max_positions: int, text: str = TEXT) -> None:
    """Both files of it: the second has the chat template."""
    train_tokenizer(vocab, text).save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "tokenizer_config.json", config)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    sizes = {"hidden": 256, "layers": 2, "heads": 8, "kv-heads": 4, "intermediate": 512}
    for name, default in {**sizes, "vocab": 512, "shards": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tied", action="store_true")
    options = vars(parser.parse_args())
    print(write_tiny_checkpoint(options.pop("path"), **options))


if __name__ == "__main__":
    main()
