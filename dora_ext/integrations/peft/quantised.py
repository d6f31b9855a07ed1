"""One call for bitsandbytes' layers: the weight stays packed between forward and backward.

Linear4bit: the weight is dequantised for the norm and the product, and again in backward, as bitsandbytes does it.
Linear8bitLt: the base product is bitsandbytes' own (it quantises the input, too), gain and adapter are one pass of ours
over it; the gradient of x goes through the dequantised weight, as bitsandbytes' does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...nn.base_weight import dense_weight
from ...norm_cache import NormCache
from ...ops import dora_linear, norm_and_gain

_X, _A, _B, _MAGNITUDE, _BIAS = 1, 2, 4, 8, 16  # bits of linear_backward's mask


class _QuantisedDora(torch.autograd.Function):
    """y = g * (base product + s h B^T) + bias over a packed weight, of which `dense` is the unpacked copy. `product` is
    the base product, (tokens, out), to be overwritten, or None: then it is made here."""

    @staticmethod
    def forward(ctx, x, A, B, m, bias, base, dense, product, norm, gain, scaling):
        if product is None:
            y, h, *_ = torch.ops.dora_ext.linear_forward.default(x, dense, A, B, m, bias, norm, gain, scaling, False)
        else:
            h = x.reshape(-1, x.shape[-1]) @ A.to(x.dtype).T
            torch.ops.dora_ext.compose_.default(product, h, B, gain, bias, scaling, False, False)
            y = product.view(*x.shape[:-1], product.shape[-1])
        needs = ctx.needs_input_grad
        ctx.mask = sum(bit for bit, i in ((_X, 0), (_A, 1), (_B, 2), (_MAGNITUDE, 3), (_BIAS, 4)) if needs[i])
        ctx.base, ctx.scaling = base, scaling
        ctx.save_for_backward(x, h, A, B, m, bias, norm, gain, y if needs[3] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h, A, B, m, bias, norm, gain, y = ctx.saved_tensors
        dense = dense_weight(ctx.base).to(x.dtype)
        grads = torch.ops.dora_ext.linear_backward.default(
            grad_y, y, x, h, dense, A, B, m, bias, norm, gain, ctx.scaling, False, ctx.mask
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
    dense = dense_weight(base)
    norm, gain = _norm_and_gain(base.weight, dense, A, B, m, scaling, cache)
    dtype = _compute_dtype(base, x) if four_bit else x.dtype
    # bitsandbytes' products know no autocast.
    with torch.autocast(x.device.type, enabled=False):
        inputs, dense = dropped.to(dtype), dense.to(dtype)
        if torch.compiler.is_compiling():  # the compiler decides what is kept for backward
            y = dora_linear(inputs, dense, A, B, m, base.bias, scaling=scaling, norm=norm, gain=gain)
        else:
            product = None if four_bit else _int8_product(base, inputs)
            y = _QuantisedDora.apply(inputs, A, B, m, base.bias, base, dense, product, norm, gain, float(scaling))
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


def _int8_product(base: nn.Module, x: Tensor) -> Tensor:
    """The base product (tokens, out) as Linear8bitLt's forward makes it, without its bias and without gradients."""
    import bitsandbytes

    state, weight = base.state, base.weight
    state.is_training = base.training
    if weight.CB is not None:
        base.init_8bit_state()
    with torch.no_grad():
        return bitsandbytes.matmul(x.reshape(-1, x.shape[-1]), weight, bias=None, state=state)


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
