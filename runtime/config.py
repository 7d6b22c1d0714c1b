"""The words all floors share: ModelConfig, Mapping, QuantConfig.

They are TensorRT-LLM's words, and `to_dict` / `from_dict` are its checkpoint
`config.json`. This file knows no tensor and no Hugging Face name.
Source: TensorRT-LLM 1.2.1 checkpoint format, `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from enginehouse.runtime.config_parts import (
    LATENT,
    Delta,
    Latent,
    check_delta,
    delta_of,
    json_object,
    latent_of,
    number,
    whole,
    word,
)
from enginehouse.runtime.errors import EngineError

DTYPES = ("bfloat16", "float16", "float32")

_MOST_LAYERS = _MOST_RANKS = 10_000  # more are damage, which nobody should count to

# Written for every algorithm: a list here replaces TensorRT-LLM's defaults, so it must be whole.
EXCLUDE_MODULES = (
    "*lm_head",
    "*vocab_embedding",
    "*router",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """How one model is spread over GPUs; rank = pp_rank * tp_size + tp_rank.

    tp_size=4, pp_size=2:

        pp_rank 0:  ranks 0 1 2 3   first half of the layers
        pp_rank 1:  ranks 4 5 6 7   second half
    """

    tp_size: int = 1
    pp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def rank(self, pp_rank: int, tp_rank: int) -> int:
        return pp_rank * self.tp_size + tp_rank

    def layers(self, pp_rank: int, num_layers: int) -> range:
        """The global layers of one pipeline stage: the first `n % pp` stages hold one more."""
        share, rest = divmod(num_layers, self.pp_size)
        start = pp_rank * share + min(pp_rank, rest)
        return range(start, start + share + (pp_rank < rest))

    def to_dict(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "cp_size": 1,
            "gpus_per_node": 8,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Mapping:
        mapping = cls(*(whole(data, key, 1, most=_MOST_RANKS) for key in ("tp_size", "pp_size")))
        world_size = whole(data, "world_size", mapping.world_size)
        if data.get("cp_size", 1) != 1 or world_size != mapping.world_size:
            raise EngineError(
                f"mapping says world_size={world_size}, cp_size={data.get('cp_size', 1)} for "
                f"tp_size={mapping.tp_size}, pp_size={mapping.pp_size}; "
                "wanted cp_size=1 and world_size = tp_size * pp_size"
            )
        return mapping


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The checkpoint's `quantization` object. quant_algo None means unquantised weights."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int = 128
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: tuple[str, ...] | None = EXCLUDE_MODULES
    # Of MIXED_PRECISION, which no engine has: a module, and its form. All others are excluded.
    quantized_layers: tuple[tuple[str, QuantConfig], ...] = ()

    def of(self, module: str) -> QuantConfig:
        """The form of one module: of MIXED_PRECISION its own."""
        return dict(self.quantized_layers).get(module, self)

    def excludes(self, module: str) -> bool:
        """Whether a module (`transformer.layers.3.mlp.proj`, layers local) stays unquantised."""
        if self.quant_algo == "MIXED_PRECISION" and module not in dict(self.quantized_layers):
            return True
        patterns = EXCLUDE_MODULES if self.exclude_modules is None else self.exclude_modules
        return any(fnmatchcase(module, pattern) for pattern in patterns)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_algo": self.quant_algo,
            "kv_cache_quant_algo": self.kv_cache_quant_algo,
            "group_size": self.group_size,
            "has_zero_point": self.has_zero_point,
            "pre_quant_scale": self.pre_quant_scale,
            "exclude_modules": None if self.exclude_modules is None else list(self.exclude_modules),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantConfig:
        exclude = data.get("exclude_modules")
        listed = [] if exclude is None else exclude
        if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
            raise EngineError(
                f"config.json has exclude_modules={exclude!r}; wanted a list of words"
            )
        return cls(
            quant_algo=word(data, "quant_algo"),
            kv_cache_quant_algo=word(data, "kv_cache_quant_algo"),
            group_size=whole(data, "group_size", 128, least=0),
            has_zero_point=bool(data.get("has_zero_point", False)),
            pre_quant_scale=bool(data.get("pre_quant_scale", False)),
            exclude_modules=None if exclude is None else tuple(exclude),
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model, and how its checkpoint is cut and quantised.

    Counts are global (never per rank); vocab_size is unpadded. `extra` holds the keys that
    only one family has, exactly as they stand in config.json.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    norm_epsilon: float
    max_position_embeddings: int
    hidden_act: str = "silu"
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_parallel_embedding: bool = False
    mapping: Mapping = field(default_factory=Mapping)
    quantization: QuantConfig = field(default_factory=QuantConfig)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection of the whole model."""
        return self.num_attention_heads * self.query_size + self.kv_size

    @property
    def kv_size(self) -> int:
        """Those of k and v."""
        return 2 * self.num_key_value_heads * self.head_size

    @property
    def latent(self) -> Latent | None:
        """None where each KV head has keys and values of its own. Else one head of head_size, rank
        and rope together, is kept for all.
        """
        return latent_of(self.extra)

    @property
    def delta(self) -> Delta | None:
        """None where no layer has linear attention."""
        return delta_of(self.extra)

    @property
    def query_size(self) -> int:
        """Rows of a query head in qkv: with those of its gate, which follow, where it has one."""
        return self.head_size * (2 if self.extra.get("attention_gate") else 1)

    def of_layer(self, layer: int) -> ModelConfig:
        """The model as one of its layers has it, where heads differ (`layer_head_sizes`,
        `layer_kv_heads`): with that layer's head_size and num_key_value_heads.
        """
        sizes, heads = (self.extra.get(f"layer_{word}") for word in ("head_sizes", "kv_heads"))
        if not sizes or not heads:
            return self
        return replace(self, head_size=int(sizes[layer]), num_key_value_heads=int(heads[layer]))

    def kv_layer(self, layer: int) -> int:
        """The layer whose keys and values a layer reads (`kv_source_layers`): mostly itself."""
        sources = self.extra.get("kv_source_layers")
        return int(sources[layer]) if sources else layer

    def has_keys(self, layer: int) -> bool:
        """Whether a layer makes keys and values."""
        return self.has_attention(layer) and self.kv_layer(layer) == layer

    @property
    def per_layer_size(self) -> int:
        """Numbers of what each layer gets of a token besides; 0 where there is nothing."""
        return int(self.extra.get("per_layer_input_size") or 0)

    @property
    def num_streams(self) -> int:
        """Hidden states of a token that go from layer to layer; mostly one."""
        return int(self.extra.get("altup_num_inputs") or 1)

    @property
    def attended_size(self) -> int:
        """What enters attention.dense, of all heads."""
        size = self.head_size if self.latent is None else self.latent.value
        return self.num_attention_heads * size

    @property
    def num_experts(self) -> int:
        """Experts of each layer's mixture; 0 for a dense model."""
        return int((self.extra.get("moe") or {}).get("num_experts", 0))

    @property
    def moe_intermediate_size(self) -> int:
        """Rows of one expert's gate; Mixtral keeps them in intermediate_size."""
        return int(self.extra.get("moe_intermediate_size") or self.intermediate_size)

    @property
    def shared_expert_size(self) -> int:
        """Rows of the gate of the expert that every token sees; 0 where there is none."""
        return int((self.extra.get("moe") or {}).get("shared_expert_intermediate_size", 0))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is the mixture; `dense_layers` of a mixture have a plain one."""
        return self.num_experts > 0 and layer not in self.extra.get("dense_layers", ())

    def has_attention(self, layer: int) -> bool:
        """Over keys: false for `no_attention_layers`, whose first half gives nothing, and where
        attention is linear.
        """
        return layer not in self.extra.get("no_attention_layers", ()) and not self.is_linear(layer)

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has a state in the place of keys and values."""
        return layer in (self.extra.get("linear_attention") or {}).get("layers", ())

    def has_mlp(self, layer: int) -> bool:
        return self.has_experts(layer) or self.inner_size(layer) > 0

    def inner_size(self, layer: int) -> int:
        """Rows of the gate of a layer's plain MLP, whole; 0 where it has no MLP."""
        own = self.extra.get("layer_intermediate_sizes")
        return int(own[layer]) if own else self.intermediate_size

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """All that TP cuts of MLPs: the rows of their gates, each size once, that of experts or of
        most layers first.
        """
        experts = (self.moe_intermediate_size, self.shared_expert_size) if self.num_experts else ()
        layers = range(self.num_hidden_layers)
        plain = [self.inner_size(i) for i in layers if not self.has_experts(i)]
        return tuple(size for size in dict.fromkeys((*experts, *plain)) if size)

    @property
    def gated_mlp(self) -> bool:
        """Whether what enters mlp.proj is a product of two linears: false where it is mlp.fc's."""
        return bool(self.extra.get("gated_mlp", True))

    @property
    def layer_norm(self) -> bool:
        """Whether norms take the mean off first, and may have biases."""
        return bool(self.extra.get("layer_norm", False))

    @property
    def gate_in_fc(self) -> bool:
        """Whether mlp.fc holds up and gate, in this order, and there is no mlp.gate."""
        return self.hidden_act in ("swiglu", "geglu")

    @property
    def rotary_dim(self) -> int:
        """Leading elements of a head that are rotated; rotary_pct is Phi-3's."""
        if self.latent is not None:
            return self.latent.rope
        return int(self.head_size * float(self.extra.get("rotary_pct", 1.0)))

    @property
    def position_embedding_type(self) -> str:
        kind = (self.rotary_scaling or {}).get("type")
        return "long_rope" if kind == "longrope" else "rope_gpt_neox"

    def padded_vocab_size(self) -> int:
        tp = self.mapping.tp_size
        return -(-self.vocab_size // tp) * tp

    def with_mapping(self, mapping: Mapping) -> ModelConfig:
        return replace(self, mapping=mapping, use_parallel_embedding=mapping.tp_size > 1)

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return {
            "architecture": self.architecture,
            "dtype": self.dtype,
            "logits_dtype": "float32",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_size": self.head_size,
            "intermediate_size": self.intermediate_size,
            "hidden_act": self.hidden_act,
            "norm_epsilon": self.norm_epsilon,
            "position_embedding_type": self.position_embedding_type,
            "max_position_embeddings": self.max_position_embeddings,
            "rotary_embedding_dim": self.rotary_dim,
            "rotary_base": self.rotary_base,
            "rotary_scaling": self.rotary_scaling,
            "attn_bias": self.attn_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_parallel_embedding": self.use_parallel_embedding,
            "embedding_sharding_dim": 0,
            "mapping": self.mapping.to_dict(),
            "quantization": self.quantization.to_dict(),
            **self.extra,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Read config.json; EngineError names a missing key."""
        known = set(cls(**_PROBE).to_dict())
        try:
            if data["dtype"] not in DTYPES:
                wanted = ", ".join(DTYPES)
                raise EngineError(f"config.json has dtype={data['dtype']!r}; wanted {wanted}")
            heads, hidden = whole(data, "num_attention_heads"), whole(data, "hidden_size")
            for key in ("num_experts", "top_k"):
                whole(json_object(data, "moe"), key, 0, least=0)
            for key in ("moe_intermediate_size", *LATENT):
                whole(data, key, 0, least=0)
            check_delta(data)
            number(data, "rotary_pct", 1.0)
            return cls(
                architecture=str(data["architecture"]),
                dtype=str(data["dtype"]),
                vocab_size=whole(data, "vocab_size"),
                hidden_size=hidden,
                num_hidden_layers=whole(data, "num_hidden_layers", most=_MOST_LAYERS),
                num_attention_heads=heads,
                num_key_value_heads=whole(data, "num_key_value_heads", heads),
                head_size=whole(data, "head_size", max(1, hidden // heads)),
                intermediate_size=whole(data, "intermediate_size", 4 * hidden),
                norm_epsilon=number(data, "norm_epsilon", 1e-5),
                max_position_embeddings=whole(data, "max_position_embeddings"),
                hidden_act=str(data["hidden_act"]),
                rotary_base=number(data, "rotary_base", 10000.0),
                rotary_scaling=json_object(data, "rotary_scaling") or None,
                attn_bias=bool(data.get("attn_bias", False)),
                mlp_bias=bool(data.get("mlp_bias", False)),
                tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
                use_parallel_embedding=bool(data.get("use_parallel_embedding", False)),
                mapping=Mapping.from_dict(json_object(data, "mapping")),
                quantization=QuantConfig.from_dict(json_object(data, "quantization")),
                extra={key: value for key, value in data.items() if key not in known},
            )
        except KeyError as error:
            raise EngineError(f"config.json has no {error.args[0]!r}") from None


_PROBE: dict[str, Any] = dict(
    architecture="",
    dtype="",
    vocab_size=0,
    hidden_size=0,
    num_hidden_layers=0,
    num_attention_heads=0,
    num_key_value_heads=0,
    head_size=0,
    intermediate_size=0,
    norm_epsilon=0.0,
    max_position_embeddings=0,
)
