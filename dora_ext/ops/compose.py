"""The pass over a layer's output: gain, adapter and bias at once; and what a DoRA adds to a finished base result."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ._registry import fake, without_autocast
from .features import feature_products, times_matrix


@fake("compose")
def _(base, h, lora_B, gain, bias, scaling, delta=False, channels_first=False):
    return torch.empty_like(base)


@fake("compose_")
def _(base, h, lora_B, gain, bias, scaling, delta=False, channels_first=False):
    return None


@fake("compose_backward")
def _(grad, saved, norm, gain, bias, saved_is_output, delta=False, channels_first=False, want_G=True,
      magnitude_dtype=None):  # fmt: skip
    grad_magnitude = torch.empty_like(norm, dtype=magnitude_dtype or norm.dtype)
    return torch.empty_like(saved) if want_G else saved.new_empty(0), grad_magnitude, torch.empty_like(norm)


@fake("feature_gradients")
def _(E, lora_B, norm, gain, grad_magnitude, scaling, want_B, magnitude_dtype, scaled_dtype):
    out, r = lora_B.shape[:2]
    grad_B = lora_B.new_empty(lora_B.shape) if want_B else norm.new_empty(0)
    grad_m = norm.new_empty(0 if magnitude_dtype is None else out, dtype=magnitude_dtype)
    return grad_B, grad_m, norm.new_empty(0 if scaled_dtype is None else (out, r), dtype=scaled_dtype)


@fake("magnitude_grad_recover_")
def _(grad_magnitude, grad_y, x, h, weight, lora_B, norm, gain, scaling, transposed=False, beside=False):
    return None


@fake("cast_factors")
def _(lora_A, lora_B, dtype):
    return torch.empty_like(lora_A, dtype=dtype), torch.empty_like(lora_B, dtype=dtype)


@fake("scale_rows")
def _(weight, gain):
    return torch.empty_like(weight)


@fake("magnitude_grad_recover_nf4_")
def _(grad_magnitude, *_):
    return None


class _DoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, h, lora_B, magnitude, norm, bias, scaling, channels_first):
        gain = torch.where(norm > 0, magnitude.to(norm.dtype) / norm, 0.0)
        ctx.scaling, ctx.channels_first = scaling, channels_first
        ctx.save_for_backward(base, h, lora_B, norm, gain, bias)
        ctx.magnitude_dtype = magnitude.dtype
        return torch.ops.dora_ext.compose.default(base, h, lora_B, gain, bias, scaling, True, channels_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with without_autocast(grad.device):
            return _DoraDelta._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        base, h, lora_B, norm, gain, bias = ctx.saved_tensors
        s, first = ctx.scaling, ctx.channels_first
        grad_base, dm, sums = torch.ops.dora_ext.compose_backward.default(
            grad, base, norm, gain, bias, False, True, first
        )
        E = feature_products(grad, h, first)
        grad_B, dm, scaled_B = torch.ops.dora_ext.feature_gradients.default(
            E, lora_B, norm, gain, dm, s, True, ctx.magnitude_dtype, grad.dtype
        )
        grad_h = times_matrix(grad, scaled_B, first)
        grad_bias = None if bias is None else ((1 - gain) * sums).to(bias.dtype)
        return grad_base, grad_h, grad_B, dm, None, grad_bias, None, None


def dora_delta(
    base_result: Tensor,
    h: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    channels_first: bool = False,
) -> Tensor:
    """(g - 1) * (base_result - bias) + g * s h B^T: what DoRA adds to a base layer's finished output.

    Args:
        base_result: (..., out), or (batch, out, ...) when `channels_first`, with the bias in it.
        h: the output of A, (..., r) or (batch, r, ...), dtype of base_result. lora_B: (out, r).
        magnitude, norm: (out,); g = magnitude / norm, 0 where norm is 0; norm carries no gradient (section 4.3).

    Differentiable in base_result, h, lora_B, magnitude and bias.
    """
    require()
    return _DoraDelta.apply(base_result, h, lora_B, magnitude, norm, bias, float(scaling), channels_first)
