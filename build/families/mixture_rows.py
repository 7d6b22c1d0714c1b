"""The rows of mixtures of experts: a router, all experts in one tensor, and what families have
beside them: shared experts, dense layers, corrections of the router's scores.

Knows names alone. Source: TensorRT-LLM 1.2.1 checkpoint format (`mlp.router`, `mlp.fc`, `mlp.proj`,
`mlp.shared_expert`, `mlp.shared_expert_gate`); transformers' models, 4 and 5.
"""

from __future__ import annotations

from enginehouse.build.families.rows import SOURCE, TARGET, TensorRow, exact, only, row
from enginehouse.runtime.config import ModelConfig


def has_experts(config: ModelConfig, layer: int) -> bool:
    return config.has_experts(layer)


def has_none(config: ModelConfig, layer: int) -> bool:
    return not config.has_experts(layer)


def has_shared(config: ModelConfig, layer: int) -> bool:
    return config.has_experts(layer) and config.shared_expert_size > 0


def experts(
    router: str, up: str, gate: str, down: str, correction: str | None = None
) -> tuple[TensorRow, ...]:
    """fc: [experts, 2 * moe_intermediate_size, hidden], of each expert up first, then gate.
    correction: what is added to the router's scores where experts are chosen, [experts].
    """
    rows = [
        row("mlp.router", router),
        row("mlp.fc", up, gate, recipe="experts"),
        row("mlp.proj", down, recipe="experts"),
    ]
    if correction is not None:
        rows.append(exact("mlp.router.e_score_correction_bias", correction, "flat"))
    return only(has_experts, rows)


def shared(name: str) -> tuple[TensorRow, ...]:
    """The expert that every token sees, up first, then gate."""
    return only(
        has_shared,
        (
            row("mlp.shared_expert.fc", f"{name}.up_proj", f"{name}.gate_proj"),
            row("mlp.shared_expert.proj", f"{name}.down_proj"),
        ),
    )


# In layers without experts; up first, then gate, as an expert's.
_DENSE_MLP = only(
    has_none, (row("mlp.fc", "mlp.up_proj", "mlp.gate_proj"), row("mlp.proj", "mlp.down_proj"))
)
_MIXTRAL = "block_sparse_moe.experts.{expert}."
_MIXTRAL_NAMES = (f"{_MIXTRAL}w3", f"{_MIXTRAL}w1", f"{_MIXTRAL}w2")
MIXTRAL_MLP = experts("block_sparse_moe.gate", *_MIXTRAL_NAMES)
MINIMAX_MLP = experts(
    "block_sparse_moe.gate", *_MIXTRAL_NAMES, "block_sparse_moe.e_score_correction_bias"
)
_QWEN = "mlp.experts.{expert}."
_QWEN_NAMES = (f"{_QWEN}up_proj", f"{_QWEN}gate_proj", f"{_QWEN}down_proj")
QWEN_MOE_MLP = (*_DENSE_MLP, *experts("mlp.gate", *_QWEN_NAMES))
QWEN2_MOE_MLP = (
    *QWEN_MOE_MLP,
    *shared("mlp.shared_expert"),
    *only(has_shared, (row("mlp.shared_expert_gate", "mlp.shared_expert_gate"),)),
)
DEEPSEEK_MLP = (
    *_DENSE_MLP,
    *experts("mlp.gate", *_QWEN_NAMES, "mlp.gate.e_score_correction_bias"),
    *shared("mlp.shared_experts"),
)
DEEPSEEK_V2_MLP = (*QWEN_MOE_MLP, *shared("mlp.shared_experts"))
ERNIE_MLP = (
    *_DENSE_MLP,
    *experts("mlp.gate", *_QWEN_NAMES, "mlp.moe_statics.e_score_correction_bias"),
    *shared("mlp.shared_experts"),
)
HUNYUAN_MLP = (*experts("mlp.gate.wg", *_QWEN_NAMES), *shared("mlp.shared_mlp"))
GRANITE_SHARED_MLP = (
    *experts("mlp.gate", *_QWEN_NAMES),
    *only(
        has_shared,
        (
            row("mlp.shared_expert.fc", "shared_mlp.input_linear", recipe="swap_halves"),
            row("mlp.shared_expert.proj", "shared_mlp.output_linear"),
        ),
    ),
)
_LLAMA4 = "feed_forward"
LLAMA4_MLP = (
    *only(
        has_none,
        (
            row("mlp.fc", f"{_LLAMA4}.up_proj", f"{_LLAMA4}.gate_proj"),
            row("mlp.proj", f"{_LLAMA4}.down_proj"),
        ),
    ),
    *only(
        has_experts,
        (
            row("mlp.router", f"{_LLAMA4}.router"),
            exact("mlp.fc.weight", f"{_LLAMA4}.experts.gate_up_proj", "turned_halves"),
            exact("mlp.proj.weight", f"{_LLAMA4}.experts.down_proj", "turned_experts"),
        ),
    ),
    *shared(f"{_LLAMA4}.shared_expert"),
)
_GEMMA4_NORMS = {
    "post_shared_layernorm": "post_feedforward_layernorm_1",
    "pre_experts_layernorm": "pre_feedforward_layernorm_2",
    "post_experts_layernorm": "post_feedforward_layernorm_2",
}
_ROUTER = (f"{SOURCE}router.proj.weight", f"{SOURCE}router.scale")
GEMMA4_MLP = (
    *_DENSE_MLP,
    *only(
        has_experts,
        (
            TensorRow(f"{TARGET}mlp.router.weight", _ROUTER, recipe="router"),
            exact("mlp.router.expert_scale", "router.per_expert_scale"),
            exact("mlp.fc.weight", "experts.gate_up_proj", "stacked_halves"),
            exact("mlp.proj.weight", "experts.down_proj", "stacked"),
            *(row(target, source) for target, source in _GEMMA4_NORMS.items()),
        ),
    ),
    *shared("mlp"),
)
GPT_OSS_MLP = (
    row("mlp.router", "mlp.router"),
    exact("mlp.router.bias", "mlp.router.bias"),
    exact("mlp.fc.weight", "mlp.experts.gate_up_proj", "turned_pairs"),
    exact("mlp.fc.bias", "mlp.experts.gate_up_proj_bias", "pairs"),
    exact("mlp.proj.weight", "mlp.experts.down_proj", "turned_experts"),
    exact("mlp.proj.bias", "mlp.experts.down_proj_bias"),
)
# Of families that have others' tensors under names of their own.
_GRANITE = {
    "block_sparse_moe.input_linear.weight": "mlp.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "mlp.experts.down_proj",
    "block_sparse_moe.router.layer.weight": "mlp.gate.weight",
}
RENAMED: dict[str, dict[str, str]] = dict.fromkeys(
    ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"), _GRANITE
)
