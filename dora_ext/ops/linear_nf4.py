"""DoRA's linear layer over a packed weight, as one autograd node: between forward and backward it stays packed.

Each of the two unpacks it once; the norm comes from the packed bytes. Memory for one dense weight is needed while one
of them runs. NF4 is unpacked inside ops of its own, so that torch.compile's graphs cannot keep the copy either.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ..norm_cache import NormCache
from ._registry import autocast_dtype, fake, without_autocast
from .linear import add_product, asked_for
from .nf4 import NF4Tensor, dequantize_nf4
from .norm_nf4 import has_norm_nf4, norm_and_gain_nf4

# Bits of linear_nf4_backward's mask, in the order of its results; linear_backward's lacks the last.
_X, _A, _B, _MAGNITUDE, _BIAS, _REST = 1, 2, 4, 8, 16, 32


@fake("linear_nf4_forward")
def _(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, magnitude, bias, norm, gain, scaling, rest, dense):  # fmt: skip
    y = x.new_empty((*x.shape[:-1], lora_B.shape[0]))
    return y, x.new_empty((x.shape[:-1].numel(), lora_A.shape[0])), x.new_empty(0 if rest is None else y.shape)


@fake("linear_nf4_backward")
def _(grad_y, y, x, h, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, magnitude, bias, norm, gain, scaling, mask):  # fmt: skip
    return asked_for(mask, (x, lora_A, lora_B, magnitude, bias, x))


def _once(backward: Callable) -> Callable:
    """once_differentiable, which costs as much as a small launch, only where a graph of gradients is wanted: elsewhere
    it has nothing to do."""
    checked = once_differentiable(backward)
    return lambda ctx, grad: (checked if torch.is_grad_enabled() else backward)(ctx, grad)


def _save(ctx, inputs: tuple, constants: tuple, y: Tensor | None) -> None:
    """What backward needs, for `_saved`. `constants` are small, and nobody trains them.

    Under activation checkpointing a saved tensor goes through Python three times (forward, recomputation, backward),
    which costs the host as much as a small launch. Constants aren't worth it: the node itself holds them.
    """
    if torch.compiler.is_compiling():  # whose graphs keep what is saved
        ctx.save_for_backward(*inputs, *constants, y)
        ctx.constants = ()
        return
    ctx.save_for_backward(*inputs, y)
    ctx.constants, ctx.versions = constants, (_versions(inputs), _versions(constants))


def _saved(ctx) -> tuple[Tensor | None, ...]:
    """(*inputs, *constants, y), with None for y, the output, if it has been overwritten since."""
    if torch.compiler.is_compiling():
        *inputs, y = ctx.saved_tensors
        return (*inputs, *ctx.constants, y)
    try:
        *inputs, y = ctx.saved_tensors
    except RuntimeError:
        *raw, _ = ctx._raw_saved_tensors
        inputs = [None if t is None else t.data if t.unpack_hook is None else t.unpack_hook(t.data) for t in raw]
        if _versions(inputs) != ctx.versions[0]:
            raise  # an input was overwritten, which nothing can make good
        y = None
    if _versions(ctx.constants) != ctx.versions[1]:
        raise RuntimeError("dora_ext: a norm, gain or scale needed for backward was modified by an inplace operation")
    return (*inputs, *ctx.constants, y)


def _like_magnitude(ctx, gain: Tensor) -> Tensor:
    """In m's place: a backward op asks it for shape and dtype alone, and this way it need not be saved."""
    return gain if gain.dtype == ctx.magnitude_dtype else torch.empty_like(gain, dtype=ctx.magnitude_dtype)


def _versions(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


class _DoraLinearPacked(torch.autograd.Function):
    """y = g * (x W^T + s h B^T) + bias + rest W^T over what W is packed in, `stored`: its bytes and their scales, or
    nothing. `rest` may be None.

    forward(x, rest, stored, A, B, m, bias, norm, gain, s) gives y without rest, h and y. backward(grad_y, y, x, h,
    stored, A, B, m, bias, norm, gain, s, mask) gives the gradients of x, A, B, m, bias and rest.
    """

    @staticmethod
    def forward(ctx, forward, backward, x, rest, lora_A, lora_B, magnitude, bias, norm, gain, scaling, *stored):
        y, h, total = forward(x, rest, stored, lora_A, lora_B, magnitude, bias, norm, gain, scaling)
        needs = ctx.needs_input_grad
        ctx.mask = _X * needs[2] + _A * needs[4] + _B * needs[5] + _MAGNITUDE * needs[6] + _BIAS * needs[7]
        ctx.mask += _REST * needs[3]
        ctx.backward_of, ctx.scaling, ctx.magnitude_dtype = backward, scaling, magnitude.dtype
        packed, scales = stored[:1], stored[1:]
        inputs = (x, h, lora_A, lora_B, bias, *packed)
        _save(ctx, inputs, (*scales, norm, gain), y if needs[6] else None)
        return y if rest is None else total

    @staticmethod
    @_once
    def backward(ctx, grad_y):
        x, h, lora_A, lora_B, bias, *stored, norm, gain, y = _saved(ctx)
        m = _like_magnitude(ctx, gain)
        grads = ctx.backward_of(grad_y, y, x, h, stored, lora_A, lora_B, m, bias, norm, gain, ctx.scaling, ctx.mask)
        dx, dA, dB, dm, db, grad_rest = (g if ctx.mask >> i & 1 else None for i, g in enumerate(grads))
        return None, None, dx, grad_rest, dA, dB, dm, db, None, None, None, *([None] * len(stored))


def _forward_unpacked(dense, product, x, rest, stored, lora_A, lora_B, magnitude, bias, norm, gain, scaling):
    if product is None:
        op = torch.ops.dora_ext.linear_forward.default
        y, h, *_ = op(x, dense, lora_A, lora_B, magnitude, bias, norm, gain, scaling, False)
    else:
        y, h = product(x), x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).T
        # g * (x W^T + bias) + (1 - g) * bias
        remaining = None if bias is None else (1 - gain) * bias
        op = torch.ops.dora_ext.compose_.default
        op(y.view(-1, y.shape[-1]), h, lora_B, gain, remaining, scaling, False, False)
    return y, h, None if rest is None else add_product(y, rest, dense.T)


def _backward_unpacked(unpack, grad_y, y, x, h, stored, A, B, m, bias, norm, gain, scaling, mask):
    dense = unpack()
    op = torch.ops.dora_ext.linear_backward.default
    grads = op(grad_y, y, x, h, dense, A, B, m, bias, norm, gain, scaling, False, mask & ~_REST)
    with without_autocast(grad_y.device):
        return *grads, grad_y.to(dense.dtype) @ dense if mask & _REST else None


def linear_unpacked(
    x: Tensor, dense: Tensor, unpack: Callable[[], Tensor], adapter: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None, norm: Tensor, gain: Tensor, *, scaling: float, rest: Tensor | None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """dora_linear, and rest W^T, for any packed format: `dense` is W (out, in) in x's dtype, which `unpack()` makes
    again in backward. adapter = (A, B, m). product(x) = x W^T + bias (..., out), a new tensor, where the packed
    format's own product is to be used."""
    require()
    run = partial(_forward_unpacked, dense, product), partial(_backward_unpacked, unpack)
    with without_autocast(x.device):  # the caller has chosen the dtype
        return _DoraLinearPacked.apply(*run, x, rest, *adapter, bias, norm, gain, float(scaling))


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
    return linear_packed(x, weight, (lora_A, lora_B, magnitude), bias, scaling=scaling, cache=cache, rest=rest)


def linear_packed(
    x: Tensor, weight: NF4Tensor, adapter: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, *, scaling: float,
    cache: NormCache | None, rest: Tensor | None,
) -> Tensor:  # fmt: skip
    """dora_linear_nf4 in x's dtype, whatever autocast says: its ops don't ask it. adapter = (A, B, m)."""
    dense = values = None
    if not has_norm_nf4(weight.packed.device):
        values = dequantize_nf4(weight)
        dense = values.to(x.dtype)
    norm, gain = norm_and_gain_nf4(weight, *adapter, scaling=scaling, cache=cache, dense=values)
    stored = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    layout = (weight.blocksize, weight.shape, weight.dtype, weight.nested_blocksize)
    operands = (*adapter, bias, norm, gain, float(scaling))
    if not torch.is_grad_enabled():  # as in dora_linear
        y, _, total = _forward_nf4(layout, dense, x, rest, stored, *operands)
        return y if rest is None else total
    run = partial(_forward_nf4, layout, dense), partial(_backward_nf4, layout)
    return _DoraLinearPacked.apply(*run, x, rest, *operands, *stored)


def _operands(layout: tuple, stored: tuple) -> tuple:
    """NF4Tensor.operands of its parts."""
    blocksize, shape, dtype, nested_blocksize = layout
    packed, absmax, *nested = stored
    return packed, absmax, blocksize, shape, dtype, *nested, nested_blocksize


def _forward_nf4(layout, dense, x, rest, stored, *others):
    op = torch.ops.dora_ext.linear_nf4_forward.default
    return op(x, *_operands(layout, stored), *others, rest, dense)


def _backward_nf4(layout, grad_y, y, x, h, stored, *others):
    op = torch.ops.dora_ext.linear_nf4_backward.default
    return op(grad_y, y, x, h, *_operands(layout, stored), *others)
