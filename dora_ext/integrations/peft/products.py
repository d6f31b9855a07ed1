"""Bitsandbytes' layers: base products that are not ours, with gain and adapter in one pass over them; packed weights.

Linear4bit: the norm comes from the packed weight (NF4), which is dequantised for the product and again in backward.
Linear8bitLt: the base product is bitsandbytes' own (it quantises the input, too); the gradient of x goes through the
dequantised weight, as bitsandbytes' does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...nn.base_weight import dense_weight, packed_weight
from ...norm_cache import NormCache
from ...ops import dora_linear, dora_linear_nf4, norm_and_gain
from ...ops._registry import without_autocast
from ...ops.linear import _saved_tensors as saved_tensors

_X, _A, _B, _MAGNITUDE, _BIAS = 1, 2, 4, 8, 16  # bits of linear_backward's mask


class _OverProduct(torch.autograd.Function):
    """y = g * (x W^T + s (x A^T) B^T) + bias, with `product(x)` = x W^T + bias (..., out), a new tensor; or None:
    then it is made of `dense`, W unpacked. Backward unpacks W from `base` again, so that the dense one is not kept."""

    @staticmethod
    def forward(ctx, x, A, B, m, bias, dense, base, product, norm, gain, scaling):
        if product is None:
            y, h, *_ = torch.ops.dora_ext.linear_forward.default(x, dense, A, B, m, bias, norm, gain, scaling, False)
        else:
            y, h = product(x), x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).T
            # g * (x W^T + bias) + (1 - g) * bias
            rest = None if bias is None else (1 - gain) * bias
            torch.ops.dora_ext.compose_.default(y.view(-1, y.shape[-1]), h, B, gain, rest, scaling, False, False)
        needs = ctx.needs_input_grad
        ctx.mask = sum(bit for bit, i in ((_X, 0), (_A, 1), (_B, 2), (_MAGNITUDE, 3), (_BIAS, 4)) if needs[i])
        ctx.base, ctx.scaling = base, scaling
        inputs = (x, h, A, B, m, bias, norm, gain)
        ctx.save_for_backward(*inputs, y if needs[3] else None)
        ctx.versions = [None if t is None or t.is_inference() else t._version for t in inputs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h, A, B, m, bias, norm, gain, y = saved_tensors(ctx)
        grads = torch.ops.dora_ext.linear_backward.default(
            grad_y, y, x, h, dense_weight(ctx.base).to(x.dtype), A, B, m, bias, norm, gain, ctx.scaling, False, ctx.mask
        )
        return *(g if ctx.mask >> i & 1 else None for i, g in enumerate(grads)), *([None] * 6)


def quantised_linear(
    base: nn.Module, x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, m: Tensor, *, scaling: float, cache: NormCache
) -> Tensor:
    """DoRA over bitsandbytes' Linear4bit or Linear8bitLt `base` (arXiv 2402.09353, equation 5).

    x: (..., in), any float dtype. dropped: x after dropout, or x itself (with Linear8bitLt always). A (r, in),
    B (out, r), m (out,). Returns (..., out) in x's dtype.
    """
    four_bit = hasattr(base, "compute_dtype")
    packed = packed_weight(base) if four_bit else None
    if packed is not None:
        dtype = _compute_dtype(base, x)
        rest = None if dropped is x else (x - dropped).to(dtype)
        with without_autocast(x.device):  # as bitsandbytes' products, which know no autocast
            y = dora_linear_nf4(dropped.to(dtype), packed, A, B, m, base.bias, scaling=scaling, cache=cache, rest=rest)
        return y.to(x.dtype)
    dense = dense_weight(base)
    norm, gain = _norm_and_gain(base.weight, dense, A, B, m, scaling, cache)
    dtype = _compute_dtype(base, x) if four_bit else x.dtype
    # bitsandbytes' products know no autocast.
    with torch.autocast(x.device.type, enabled=False):
        inputs, dense = dropped.to(dtype), dense.to(dtype)
        if torch.compiler.is_compiling():  # the compiler decides what is kept for backward
            y = dora_linear(inputs, dense, A, B, m, base.bias, scaling=scaling, norm=norm, gain=gain)
        else:
            product = None if four_bit else base.forward  # bitsandbytes' product of 8-bit numbers
            y = _OverProduct.apply(inputs, A, B, m, base.bias, dense, base, product, norm, gain, float(scaling))
        if dropped is not x:  # what dropout took away still goes through the base layer
            import bitsandbytes

            rest = (x - dropped).to(dtype)
            y = y + bitsandbytes.matmul_4bit(rest, base.weight.t(), quant_state=base.weight.quant_state)
    return y.to(x.dtype)


def _compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """As Linear4bit's forward chooses it, the first input deciding."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return x.dtype if base.compute_dtype is None else base.compute_dtype


def _norm_and_gain(
    packed: Tensor, dense: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float, cache: NormCache
) -> tuple[Tensor, Tensor]:
    """`dense` is another tensor each time; the packed weight is what a norm is remembered by."""
    if not cache.usable(packed):
        return norm_and_gain(dense, A, B, m, scaling=scaling)
    with torch.no_grad():

        def compute(op: Any, *state: Tensor) -> tuple[Tensor, Tensor]:
            return op(dense, A, B, m, scaling, False, *state)

        return cache.get((packed, A, B), (scaling, False), B.shape[0], compute)
