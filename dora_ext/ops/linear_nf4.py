"""DoRA's linear layer over a packed weight: between forward and backward it stays packed.

Each of the two unpacks it once. Memory for one dense weight is needed while one of them runs. NF4 is unpacked inside
ops of its own, so that torch.compile's graphs cannot keep the copy either; its autograd node is in C++, and its norm
comes from the packed bytes. Other formats are whatever their Python makes of them, and have a node in Python.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ..distributed import hold_past_hooks
from ..norm_cache import NO_NORMS, NormCache
from ._registry import autocast_dtype, call_layer, fake, without_autocast
from .linear import add_product, asked_for
from .nf4 import NF4Tensor
from .norm_nf4 import kept_norms

# Bits of linear_nf4_backward's mask, in the order of its results; linear_backward's lacks the last.
_X, _A, _B, _MAGNITUDE, _BIAS, _REST = 1, 2, 4, 8, 16, 32


@fake("linear_nf4")
def _(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, *_others):  # fmt: skip
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]))


@fake("linear_nf4_forward")
def _(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, magnitude, bias, norm, gain, scaling, rest):  # fmt: skip
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


class _DoraLinearUnpacked(torch.autograd.Function):
    """y = g * (x W^T + s h B^T) + bias + rest W^T; `unpack()` makes the dense W again in backward."""

    @staticmethod
    def forward(ctx, dense, unpack, product, x, rest, lora_A, lora_B, magnitude, bias, norm, gain, scaling):
        if product is None:
            op = torch.ops.dora_ext.linear_forward.default
            y, h, *_ = op(x, dense, lora_A, lora_B, magnitude, bias, norm, gain, scaling, False)
        else:
            y, h = product(x), x.reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).T
            # g * (x W^T + bias) + (1 - g) * bias
            remaining = None if bias is None else (1 - gain) * bias
            op = torch.ops.dora_ext.compose_.default
            op(y.view(-1, y.shape[-1]), h, lora_B, gain, remaining, scaling, False, False)
        needs = ctx.needs_input_grad
        ctx.mask = _X * needs[3] + _A * needs[5] + _B * needs[6] + _MAGNITUDE * needs[7] + _BIAS * needs[8]
        ctx.mask += _REST * needs[4]
        ctx.unpack, ctx.scaling, ctx.magnitude_dtype = unpack, scaling, magnitude.dtype
        _save(ctx, (x, h, lora_A, lora_B, bias), (norm, gain), y if needs[7] else None)
        return y if rest is None else add_product(y, rest, dense.T)

    @staticmethod
    @_once
    def backward(ctx, grad_y):
        x, h, A, B, bias, norm, gain, y = _saved(ctx)
        m, mask, dense = _like_magnitude(ctx, gain), ctx.mask, ctx.unpack()
        op = torch.ops.dora_ext.linear_backward.default
        grads = op(grad_y, y, x, h, dense, A, B, m, bias, norm, gain, ctx.scaling, False, mask & ~_REST)
        dx, dA, dB, dm, db = (g if mask >> i & 1 else None for i, g in enumerate(grads))
        with without_autocast(grad_y.device):
            grad_rest = grad_y.to(dense.dtype) @ dense if mask & _REST else None
        return None, None, None, dx, grad_rest, dA, dB, dm, db, None, None, None


def linear_unpacked(
    x: Tensor, dense: Tensor, unpack: Callable[[], Tensor], adapter: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None, norm: Tensor, gain: Tensor, *, scaling: float, rest: Tensor | None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """dora_linear, and rest W^T, for any packed format: `dense` is W (out, in) in x's dtype, which `unpack()` makes
    again in backward. adapter = (A, B, m). product(x) = x W^T + bias (..., out), a new tensor, where the packed
    format's own product is to be used."""
    require()
    with without_autocast(x.device):  # the caller has chosen the dtype
        return _DoraLinearUnpacked.apply(dense, unpack, product, x, rest, *adapter, bias, norm, gain, float(scaling))


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
    require()
    state = kept_norms(weight, *adapter[:2], scaling, cache)
    held = hold_past_hooks((*adapter, bias))
    operands = weight.operands()
    return call_layer("linear_nf4", x, *operands, *adapter, bias, float(scaling), rest, *(state or NO_NORMS), held)
