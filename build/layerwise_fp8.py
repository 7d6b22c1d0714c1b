"""FP8 through the whole model: each layer is quantised on what enters it in the unquantised one.

Asked for one layer at a time, in order. Weights are rounded so that a linear's columns make up for
each other on the calibration inputs; a layer's experts, which see few of them, to the nearest.
Memory: one layer in float32, the second moments of its linears' inputs, three copies of its
largest linear, and the calibration set's activations.
Source: GPTQ (Frantar et al., 2023), section 3, on the e4m3 grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from enginehouse.build.activations import SavedActivations
from enginehouse.build.compensation import InputMoments, round_compensated
from enginehouse.build.layerwise import SHARED_INPUTS, is_excluded
from enginehouse.build.quantization import fp8_scale, quantize_fp8
from enginehouse.build.reference import ReferenceModel, fast_products
from enginehouse.runtime.config import ModelConfig
from enginehouse.runtime.model import PREFIX, DecoderLayer, causal_attention
from enginehouse.runtime.packing import to_fp8

# Added to each channel's own second moment, as a share of it: calibration has few tokens, and what
# it says of correlations holds for other text only in part.
DAMPING = 0.1
_STRIDE = 3  # one token in so many is weighed; the largest magnitude is that of all


class LayerwiseFp8:
    """Satisfies `units.LayerLinears`. Layers must be asked for in order, each once; those that are
    not asked for are run through.

    layer: the one it stands before. An earlier run's activations are gone on with when they stand
    at `first`, the first layer that is still wanted, or before it.
    """

    def __init__(
        self,
        config: ModelConfig,
        reference: ReferenceModel,
        sequences: Sequence[Tensor],
        saved: SavedActivations,
        first: int = 0,
    ) -> None:
        self.config = config
        self.reference = reference
        self.saved = saved
        self._rotary = reference.rotary(max(len(ids) for ids in sequences))
        earlier = saved.load()
        if earlier is not None and earlier.layer <= first:
            self.layer = earlier.layer
            self._hidden = [states.to(reference.device) for states in earlier.hidden]
        else:
            self.layer, self._hidden = 0, reference.embedded(sequences)

    @torch.inference_mode()
    def __call__(self, layer: int) -> dict[str, Tensor]:
        """The checkpoint's tensors of the layer's quantised linears, whole, by module; on the CPU,
        wherever the reference runs.
        """
        assert layer >= self.layer, f"layer {layer} asked for after {self.layer - 1}"
        with fast_products():
            for unwanted in range(self.layer, layer):
                self._run(unwanted, self.reference.tensors(PREFIX.format(unwanted)), {})
            self.layer = layer
            self.saved.save(layer, self._hidden)
            tensors = self.reference.tensors(PREFIX.format(layer))
            inputs = {
                shared[0]: _Inputs(tensors[f"{shared[0]}.weight"])
                for shared in SHARED_INPUTS
                if not is_excluded(self.config, layer, shared[0])
            }
            self._run(layer, tensors, inputs)
            self.layer = layer + 1
            result: dict[str, Tensor] = {}
            for shared in SHARED_INPUTS:
                modules = [name for name in shared if f"{name}.weight" in tensors]
                if modules[0] in inputs:
                    weights = [tensors.pop(f"{module}.weight") for module in modules]
                    result |= _quantized(modules, weights, inputs.pop(modules[0]))
        return {name: tensor.cpu() for name, tensor in result.items()}

    def _run(self, layer: int, tensors: dict[str, Tensor], inputs: dict[str, _Inputs]) -> None:
        """Carries the activations through the layer, and shows `inputs` what enters them."""

        def observe(module: str, x: Tensor) -> None:
            if module in inputs:
                inputs[module].add(x)

        decoder = DecoderLayer(self.reference.config, tensors, torch.float32)
        decoder.observe = observe
        local = self.reference.traits.local_rope[layer]
        for i, states in enumerate(self._hidden):
            angles = self._rotary.at(torch.arange(len(states), device=states.device))[local]
            self._hidden[i] = decoder(layer, states, angles, causal_attention)


class _Inputs:
    """What enters the linears that share an input. Experts keep the largest magnitude alone."""

    def __init__(self, weight: Tensor) -> None:
        dense = weight.ndim == 2
        self.moments = InputMoments(weight.shape[1], weight.device) if dense else None
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        self.largest = max(self.largest, float(x.abs().amax()))
        if self.moments is not None:
            self.moments.add(x[::_STRIDE])


def _quantized(
    modules: Sequence[str], weights: Sequence[Tensor], inputs: _Inputs
) -> dict[str, Tensor]:
    """One scale for the weights, [1], and one for what enters them; experts have one each for
    their weights, [experts, 1]. An expert that calibration never chose shares the inputs' of those
    it did.
    """
    if inputs.moments is None:
        (experts,) = weights
        scale = torch.tensor([[fp8_scale(float(expert.abs().amax()))] for expert in experts])
        pairs = zip(experts, scale.flatten().tolist(), strict=True)
        parts = [torch.stack([quantize_fp8(expert, its_own) for expert, its_own in pairs])]
    else:
        scale = torch.tensor([fp8_scale(max(float(weight.abs().amax()) for weight in weights))])
        whole = quantize_fp8_compensated(torch.cat(list(weights)), scale, inputs.moments)
        parts = list(whole.split([len(weight) for weight in weights]))
    result: dict[str, Tensor] = {}
    for module, part in zip(modules, parts, strict=True):
        result[f"{module}.weight"] = part
        result[f"{module}.weights_scaling_factor"] = scale
        result[f"{module}.activation_scaling_factor"] = torch.tensor([fp8_scale(inputs.largest)])
    return result


def quantize_fp8_compensated(weight: Tensor, scale: Tensor, moments: InputMoments) -> Tensor:
    """float8_e4m3fn [out, in]; weight is about q * scale, with the least error of the outputs that
    rounding column by column finds.

    weight: float32 [out, in]; scale: float32 [1]; moments: of the linear's inputs.
    """
    second = moments.second.clone()
    mean = float(second.diagonal().mean())
    second.diagonal().mul_(1 + DAMPING).add_(1e-3 * mean + 1e-8)
    order = torch.argsort(second.diagonal(), descending=True)  # what matters most comes first
    # The last come first here, so that the factor's inverse is that of the inverse, turned round.
    turned = order.flip(0)
    lower = torch.linalg.cholesky(second[turned][:, turned])
    identity = torch.eye(len(lower), device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    steps = scale.to(weight.device).expand(1, weight.shape[1])
    return to_fp8(round_compensated(weight, steps, order, upper, lambda x: x.copy_(to_fp8(x))))
