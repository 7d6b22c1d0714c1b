"""A linear of the checkpoint in TensorRT's layers: each form's weights, scales and products.

Weights are network inputs, named as in the checkpoint but for the number of a layer, which counts
from the part's first; `runtime/tensorrt/inputs.py` makes them of a rank file's tensors. Or they are
constants. Knows no layer of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from enginehouse.build.forms.weight_forms import OutputTensor
from enginehouse.build.tensorrt.ops import NetworkOps, Value
from enginehouse.runtime.checkpoint.packing import FP8_MAX
from enginehouse.runtime.tensorrt.inputs import shift_layer, weight_form


class InputSpec(NamedTuple):
    """One network input: dtype by torch's name (`int4` for packed nibbles), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Linears:
    """Products with the linears of one rank.

    table: a rank file's tensors (`output_tensors`); dtype: of activations; algo: the checkpoint's
    quant_algo; first_layer: of the part. constants: the weights, by the checkpoint's names, where
    they are to be part of the plan. `asked` collects the names that the network asks for, `weights`
    those of them that are inputs.
    """

    def __init__(
        self,
        ops: NetworkOps,
        table: Mapping[str, OutputTensor],
        dtype: str,
        algo: str | None,
        first_layer: int = 0,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.ops = ops
        self.table = table
        self.dtype = dtype
        self.algo = algo
        self.first_layer = first_layer
        self.constants = constants
        self.asked: set[str] = set()
        self.weights: dict[str, InputSpec] = {}

    def input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Value:
        """A weight by the checkpoint's name."""
        self.asked.add(name)
        if self.constants is not None:
            return self.ops.weight(dtype, shape, self.constants[name])
        name = shift_layer(name, -self.first_layer)
        self.weights[name] = InputSpec(dtype, shape)
        return self.ops.input(name, dtype, shape)

    def vector(self, name: str, rank: int, dtype: str | None = None) -> Value:
        """A [features] tensor of the checkpoint, for the last axis of a tensor of this rank."""
        features = self.table[name].shape[0]
        value = self.ops.reshape(
            self.input(name, self.dtype, (features,)), (1,) * (rank - 1) + (features,)
        )
        return value if dtype in (None, self.dtype) else self.ops.cast(value, dtype)

    def __call__(self, module: str, x: Value) -> Value:
        """x: [B, T, in_features] -> [B, T, out_features], with the module's bias."""
        within = module.split(".", 3)[-1] if ".layers." in module else module
        with self.ops.part(within):
            y = self._product(module, x)
            if f"{module}.bias" in self.table:
                y = self.ops.elementwise("SUM", y, self.vector(f"{module}.bias", 3))
        return y

    def _product(self, module: str, x: Value) -> Value:
        kinds = [name.rpartition(".")[2] for name in self.table if name.startswith(module + ".")]
        form = weight_form(module, self.table[f"{module}.weight"].dtype, kinds, self.algo)
        return _PRODUCTS[form](self, module, x)

    def _matrix(self, module: str, dtype: str) -> Value:
        return self.input(f"{module}.weight", dtype, self.table[f"{module}.weight"].shape)

    def multiply(self, x: Value, weight: Value, shape: tuple[int, ...], transpose: bool) -> Value:
        """x @ weight.T of [out, in] when transpose, else x @ weight of [in, out]."""
        return self.ops.matmul(x, self.ops.reshape(weight, (1, *shape)), transpose)

    def _dense(self, module: str, x: Value) -> Value:
        shape = self.table[f"{module}.weight"].shape
        return self.multiply(x, self._matrix(module, self.dtype), shape, True)

    def _int4(self, module: str, x: Value) -> Value:
        """Groups along the inputs: weight int4 [in, out], scale [in // group_size, out]."""
        packed_rows, in_features = self.table[f"{module}.weight"].shape
        shape = (in_features, 2 * packed_rows)
        groups = self.table[f"{module}.weights_scaling_factor"].shape[1]
        if f"{module}.prequant_scaling_factor" in self.table:
            factor = self.vector(f"{module}.prequant_scaling_factor", 3)
            x = self.ops.elementwise("PROD", x, factor)
        weight = self.input(f"{module}.weight", "int4", shape)
        scale = self.input(f"{module}.weights_scaling_factor", self.dtype, (groups, shape[1]))
        weight = self.ops.dequantize(weight, scale, self.dtype, axis=0)
        return self.multiply(x, weight, shape, False)

    def _int8(self, module: str, x: Value) -> Value:
        """One scale for each output: weight int8 [out, in], scale [out]."""
        shape = self.table[f"{module}.weight"].shape
        scale = self.input(f"{module}.per_channel_scale", self.dtype, shape[:1])
        weight = self.ops.dequantize(self._matrix(module, "int8"), scale, self.dtype, axis=0)
        return self.multiply(x, weight, shape, True)

    def _fp8(self, module: str, x: Value) -> Value:
        """Static, per tensor: x is rounded to e4m3 by its own scale; both scales are float32 [],
        inputs themselves: of one that is computed, the compiler makes no FP8 product.
        """
        shape = self.table[f"{module}.weight"].shape
        x = self.rounded(module, x)
        weight_scale = self.input(f"{module}.weights_scaling_factor", "float32", ())
        weight = self._matrix(module, "float8_e4m3fn")
        weight = self.ops.dequantize(weight, weight_scale, self.dtype)
        return self.multiply(x, weight, shape, True)

    def rounded(self, module: str, x: Value) -> Value:
        """x as its e4m3 values by the module's own scale for it, float32 [], give it back."""
        scale = self.input(f"{module}.activation_scaling_factor", "float32", ())
        return self.ops.dequantize(self.ops.quantize_fp8(x, scale), scale, self.dtype)

    def _fp8_rowwise(self, module: str, x: Value) -> Value:
        """A scale for each output channel, and one for each token, the largest magnitude / 448.

        The token's scale is divided out before the rounding and multiplied again in float32.
        """
        ops, shape = self.ops, self.table[f"{module}.weight"].shape
        wide = ops.cast(x, "float32")
        largest = ops.reduce("MAX", ops.unary("ABS", wide), 2)
        largest = ops.elementwise("MAX", largest, ops.number(1e-12, 3))
        token_scale = ops.elementwise("DIV", largest, ops.number(FP8_MAX, 3))  # [B, T, 1]
        one = ops.constant(1.0)
        x = ops.quantize_fp8(ops.elementwise("DIV", wide, token_scale), one)
        x = ops.dequantize(x, one, self.dtype)
        scale = self.input(f"{module}.per_channel_scale", "float32", shape[:1])
        weight = self._matrix(module, "float8_e4m3fn")
        weight = ops.dequantize(weight, scale, self.dtype, axis=0)
        y = ops.cast(self.multiply(x, weight, shape, True), "float32")
        return ops.cast(ops.elementwise("PROD", y, token_scale), self.dtype)


_PRODUCTS = {
    "dense": Linears._dense,
    "int4": Linears._int4,
    "int8": Linears._int8,
    "fp8": Linears._fp8,
    "fp8_rowwise": Linears._fp8_rowwise,
}
