"""Names of activations: Hugging Face's (the first is the usual one), and TensorRT-LLM's."""

# transformers has several names for a function: swish is SiLU, gelu_new the tanh form.
SILU_WORDS = ("silu", "swish")
TANH_WORDS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
SILU, SWIGLU = (SILU_WORDS, "silu"), (SILU_WORDS, "swiglu")
GELU = (TANH_WORDS, "gelu_pytorch_tanh")
RELU2 = (("relu2",), "squared-relu")
