"""What a rank file must hold: names, shapes and dtypes, by the rules of the checkpoint format.

Written from the rules, not from the converter; `tests/test_trtllm_double.py` compares it with the
tables that were taken from TensorRT-LLM's own classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tensorrt_llm.contract import CLASSES, SIGNATURES

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
SCALE_DTYPES = ("float32", "float16", "bfloat16")
GROUPED = ("W4A16_AWQ", "W4A8_AWQ")


class Expected(NamedTuple):
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def check_config(config: dict[str, Any]) -> None:
    """Raise what 1.2.1 raises for a config.json it cannot take."""
    for key in (*SIGNATURES["checkpoint"]["config_required"], "vocab_size"):
        if key not in config:
            raise KeyError(key)
    quantization = config.get("quantization", {})
    known = CLASSES["QuantConfig"]["fields"]
    for key in quantization:
        if key not in known:
            raise TypeError(f"QuantConfig.__init__() got an unexpected keyword argument {key!r}")
    algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if algo is not None and algo not in CLASSES["QuantAlgo"]["values"]:
        raise ValueError(f"{algo!r} is not a valid QuantAlgo")
    if kv_algo is not None and kv_algo not in CLASSES["QuantAlgo"]["kv_cache_values"]:
        raise ValueError(f"{kv_algo!r} is not a valid KV cache QuantAlgo")
    mapping = config.get("mapping", {})
    tp, pp, cp = (mapping.get(f"{kind}_size", 1) for kind in ("tp", "pp", "cp"))
    if mapping.get("world_size", 1) != tp * pp * cp:
        raise ValueError(f"world_size must equal tp*pp*cp, got {mapping}")
    assert config["num_attention_heads"] % tp == 0, "num_attention_heads % tp_size"
    kv_heads = config.get("num_key_value_heads", config["num_attention_heads"])
    assert tp >= kv_heads or kv_heads % tp == 0, "the shapes would describe no real split"
    if config["architecture"].startswith("Qwen"):
        for key in ("qwen_type", "seq_length"):
            if key not in config:
                raise AttributeError(f"'QWenConfig' object has no attribute {key!r}")
    if config.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        raise ValueError("a rotary model needs position_embedding_type rope_gpt_neox")


def expected_tensors(config: dict[str, Any], rank: int) -> dict[str, Expected]:
    """Every tensor of one rank's file. NotImplementedError for a family without a table."""
    if config["architecture"] not in FAMILIES or config.get("moe"):
        raise NotImplementedError(f"the double has no table for {config['architecture']}")
    mapping = config.get("mapping", {})
    tp, pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
    stage, dtype = rank // tp, (config["dtype"],)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    padded = -(-vocab // tp)
    tensors: dict[str, Expected] = {}
    if stage == 0:
        rows = padded if config.get("use_parallel_embedding") else vocab
        tensors["transformer.vocab_embedding.weight"] = Expected((rows, hidden), dtype)
    share, rest = divmod(config["num_hidden_layers"], pp)
    for layer in range(share + (stage < rest)):
        prefix = f"transformer.layers.{layer}."
        tensors |= {prefix + name: found for name, found in _layer(config, tp).items()}
    if stage == pp - 1:
        tensors["transformer.ln_f.weight"] = Expected((hidden,), dtype)
        tensors["lm_head.weight"] = Expected((padded, hidden), dtype)
    return tensors


def _layer(config: dict[str, Any], tp: int) -> dict[str, Expected]:
    hidden, dtype = config["hidden_size"], (config["dtype"],)
    heads = config["num_attention_heads"]
    size = config.get("head_size") or hidden // heads
    kv = -(-config.get("num_key_value_heads", heads) // tp)
    inner = config["intermediate_size"] // tp
    linears = {
        "attention.qkv": ((heads // tp + 2 * kv) * size, hidden),
        "attention.dense": (hidden, heads // tp * size),
        "mlp.fc": (inner, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.proj": (hidden, inner),
    }
    tensors = {
        "input_layernorm.weight": Expected((hidden,), dtype),
        "post_layernorm.weight": Expected((hidden,), dtype),
    }
    if config.get("qk_layernorm"):
        for name in ("attention.q_layernorm.weight", "attention.k_layernorm.weight"):
            tensors[name] = Expected((size,), dtype)
    qwen2 = config.get("qwen_type") == "qwen2"
    biased = {
        "attention": bool(config.get("attn_bias")),
        "mlp": bool(config.get("mlp_bias")),
    }
    for name, (rows, columns) in linears.items():
        for part, found in _linear(config, rows, columns).items():
            tensors[f"{name}.{part}"] = found
        if biased[name.split(".")[0]] and not (qwen2 and name == "attention.dense"):
            tensors[f"{name}.bias"] = Expected((rows,), dtype)
    if config.get("quantization", {}).get("kv_cache_quant_algo"):
        tensors["attention.kv_cache_scaling_factor"] = Expected((1,), ("float32",))
    return tensors


def _linear(config: dict[str, Any], rows: int, columns: int) -> dict[str, Expected]:
    """One linear's tensors; rows and columns are the rank's."""
    quantization, dtype = config.get("quantization", {}), (config["dtype"],)
    algo = quantization.get("quant_algo")
    one = Expected((1,), ("float32",))
    if algo in (None, "NO_QUANT", "W8A16", "W4A16"):  # weight-only: quantised by the loader
        return {"weight": Expected((rows, columns), dtype)}
    float8 = {"weight": Expected((rows, columns), ("float8_e4m3fn",))}
    if algo == "FP8":
        return {**float8, "activation_scaling_factor": one, "weights_scaling_factor": one}
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return {**float8, "per_channel_scale": Expected((rows,), ("float32",))}
    if algo not in GROUPED:
        raise NotImplementedError(f"the double has no table for {algo}")
    group = quantization.get("group_size", 128)
    if group not in ((64, 128) if algo == "W4A16_AWQ" else (128,)):
        raise NotImplementedError(f"{algo} has no kernel for groups of {group}")
    multiple = 64 if algo == "W4A16_AWQ" else 128
    assert columns % group == 0 and columns % multiple == 0, f"{columns} inputs a rank"
    assert rows % 16 == 0, f"{rows} outputs a rank"
    found = {
        "weight": Expected((rows // 2, columns), ("int8",)),
        "weights_scaling_factor": Expected((rows, columns // group), SCALE_DTYPES),
    }
    if quantization.get("pre_quant_scale"):
        found["prequant_scaling_factor"] = Expected((columns,), dtype)
    if quantization.get("has_zero_point"):
        found["zero"] = Expected((columns // group, rows), dtype)
    if algo == "W4A8_AWQ":
        found |= {"weights_scaling_factor_2": one, "activation_scaling_factor": one}
    return found
