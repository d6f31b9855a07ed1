"""The product for Hopper that linear layers run on: g * ([x | h] [W | B]^T) + bias in one kernel. Nothing public."""

import torch

from ._registry import fake


@fake("hopper_product")
def _(left, right, left_tail=None, right_tail=None, gain=None, bias=None, right_transposed=False):
    return left.new_empty(left.shape[0], right.shape[1 if right_transposed else 0])


@fake("hopper_forward")
def _(x, weight, lora_A, lora_B, gain, bias, scaling):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@fake("hopper_forward_norm")
@fake("hopper_forward_norm_cached")
def _(x, weight, lora_A, lora_B, magnitude, bias, scaling, cached=None, fingerprint=None, epoch=0):
    norm = x.new_empty(weight.shape[0], dtype=torch.float32)
    hidden = x.new_empty(x.shape[0], lora_A.shape[0])
    return x.new_empty(x.shape[0], weight.shape[0]), hidden, norm, torch.empty_like(norm)


@fake("hopper_backward")
def _(grad, weight, P, lora_A, x, beside=False):
    return torch.empty_like(x, memory_format=torch.contiguous_format), lora_A.new_empty(lora_A.shape)
