"""DoRA's linear layer over a packed weight, as one autograd node: between forward and backward it stays packed.

Each of the two unpacks it once; the norm comes from the packed bytes. Memory for one dense weight is needed while one
of them runs. (torch.compile may keep that copy between them: what its graph saves is the compiler's choice.)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ..norm_cache import NormCache
from ._registry import autocast_dtype, without_autocast
from .linear import _A, _B, _BIAS, _MAGNITUDE, _X, _saved_tensors
from .nf4 import NF4Tensor, dequantize_nf4
from .norm_nf4 import has_norm_nf4, norm_and_gain_nf4


class _DoraLinearPacked(torch.autograd.Function):
    """`unpack(*stored)` gives W (out, in) in x's dtype; `dense` is that already, where it had to be made before.
    `rest`, of x's shape, goes through W alone: y = g * (x W^T + s h B^T) + bias + rest W^T."""

    @staticmethod
    def forward(ctx, unpack, dense, x, rest, lora_A, lora_B, magnitude, bias, norm, gain, scaling, *stored):
        if dense is None:
            dense = unpack(*stored)
        y, h, *_ = torch.ops.dora_ext.linear_forward.default(
            x, dense, lora_A, lora_B, magnitude, bias, norm, gain, scaling, False
        )
        needs = ctx.needs_input_grad
        ctx.mask = sum(bit for bit, i in ((_X, 2), (_A, 4), (_B, 5), (_MAGNITUDE, 6), (_BIAS, 7)) if needs[i])
        ctx.unpack, ctx.scaling = unpack, scaling
        saved_y = y if needs[6] else None
        inputs = (x, h, lora_A, lora_B, magnitude, bias, norm, gain, *stored)
        ctx.save_for_backward(*inputs, saved_y)
        if not torch.compiler.is_compiling():
            ctx.versions = [None if t is None or t.is_inference() else t._version for t in inputs]
        if rest is None:
            return y
        return torch.addmm(y.reshape(-1, y.shape[-1]), rest.reshape(-1, rest.shape[-1]), dense.T).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h, lora_A, lora_B, magnitude, bias, norm, gain, *stored, y = _saved_tensors(ctx)
        dense = ctx.unpack(*stored)
        grads = torch.ops.dora_ext.linear_backward.default(
            grad_y, y, x, h, dense, lora_A, lora_B, magnitude, bias, norm, gain, ctx.scaling, False, ctx.mask
        )
        dx, *others = (g if ctx.mask >> i & 1 else None for i, g in enumerate(grads))
        grad_rest = None
        if ctx.needs_input_grad[3]:
            with without_autocast(grad_y.device):
                grad_rest = grad_y.to(dense.dtype) @ dense
        return None, None, dx, grad_rest, *others, None, None, None, *([None] * len(stored))


def linear_packed(
    x: Tensor, unpack: Callable[..., Tensor], stored: tuple, adapter: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None, norm: Tensor, gain: Tensor, *, scaling: float, rest: Tensor | None,
    dense: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The node for any packed format; arguments as in its class, adapter = (A, B, m)."""
    require()
    with without_autocast(x.device):  # the caller has chosen the dtype
        return _DoraLinearPacked.apply(unpack, dense, x, rest, *adapter, bias, norm, gain, float(scaling), *stored)


def dora_linear_nf4(
    x: Tensor,
    weight: NF4Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    cache: NormCache | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """y = g * (x W^T + s (x A^T) B^T) + bias, g = magnitude / |W + s B A|, for a W packed in NF4 (QDoRA).

    W is dequantize_nf4(weight), in weight.dtype, then cast to x's. The norm is a constant of the backward pass (arXiv
    2402.09353, section 4.3). W is dequantised once here and once in backward; only the packed weight is kept between.

    Args:
        x: (..., in), bfloat16, float16, float32 or float64; under autocast in autocast's dtype.
        weight: W (out, in). It gets no gradient.
        lora_A, lora_B, magnitude, bias: (r, in), (out, r), (out,), (out,), as in dora_linear.
        cache: reuses the norm while nothing changed.
        rest: of x's shape; what dropout took from x. rest W^T is added.

    Returns:
        (..., out) in x's (or autocast's) dtype.

    Raises:
        ValueError, TypeError: what does not fit, by name.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, rest = x.to(dtype), None if rest is None else rest.to(dtype)
    dense = values = None
    if not has_norm_nf4(weight.packed.device):
        values = dequantize_nf4(weight)
        dense = values.to(x.dtype)
    norm, gain = norm_and_gain_nf4(weight, lora_A, lora_B, magnitude, scaling=scaling, cache=cache, dense=values)
    stored = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    layout = (weight.blocksize, weight.shape, weight.dtype, weight.nested_blocksize)
    adapter = (lora_A, lora_B, magnitude)
    return linear_packed(
        x, partial(_unpack_nf4, layout, x.dtype), stored, adapter, bias, norm, gain, scaling=scaling, rest=rest,
        dense=dense,
    )  # fmt: skip


def _unpack_nf4(
    layout: tuple, dtype: torch.dtype, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    blocksize, shape, own, nested_blocksize = layout
    # Rounded once from float32, so that this equals float32 values that are rounded afterwards.
    direct = own == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return torch.ops.dora_ext.dequantize_nf4.default(
        packed, absmax, blocksize, shape, dtype if direct else own, nested_absmax, nested_code, offset, nested_blocksize
    ).to(dtype)
