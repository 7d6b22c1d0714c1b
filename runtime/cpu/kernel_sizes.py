"""The sizes that the compiled kernels work in, as Python has to know them; imports nothing."""

# The inputs whose bytes share a scale, where activations are rounded to bytes: native/rows.h.
BYTES_PART = {"bytes": 64, "fine_bytes": 32}
LANES = 16  # of native/vectors.h: numbers of a whole vector
COLS, STEP = 32, 64  # of native/linear.h and rows.h: outputs of a block, inputs of a whole step
UNIT = 16  # of native/attention.h: tokens of keys that lie together
