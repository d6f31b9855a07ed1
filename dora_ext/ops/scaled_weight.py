"""V = g * (W + s B A): ops for use inside others, hence only their fake kernels."""

import torch

from ._registry import fake


@fake("scaled_weight")
def _(weight, lora_A, lora_B, gain, scaling, transposed=False):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@fake("scaled_weight_nf4")
def _(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, gain, scaling):  # fmt: skip
    return packed.new_empty(shape, dtype=dtype)
