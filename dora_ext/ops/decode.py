"""The linear layer for 1 to 8 tokens in one pass over the weight, dense or packed in NF4: shapes for the compiler. The
ops are called from inside linear_forward and linear_nf4_forward, where they fit."""

from ._registry import fake


def _shapes(x, lora_A, lora_B):
    return x.new_empty(x.shape[0], lora_B.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@fake("linear_decode")
def _(x, weight, lora_A, lora_B, gain, bias, scaling):
    return _shapes(x, lora_A, lora_B)


@fake("linear_decode_nf4")
def _(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, gain, bias, scaling):  # fmt: skip
    return _shapes(x, lora_A, lora_B)
