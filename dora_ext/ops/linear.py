"""DoRA's linear layer: y = g * (x W^T + s (x A^T) B^T) + bias, g = m / |W + s B A|. Its autograd node is in C++."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ..norm_cache import NormCache
from ._registry import accumulate_dtype, autocast_dtype, fake
from .norm import norm_and_gain

# Bits of linear_backward's mask, in the order of its results.
_X, _A, _B, _MAGNITUDE, _BIAS = 1, 2, 4, 8, 16


@fake("linear")
def _(x, weight, lora_A, lora_B, *_constants):
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]))


@fake("linear_forward")
def _(x, weight, lora_A, lora_B, magnitude, bias, norm, gain, scaling, transposed=False):
    y = x.new_empty((*x.shape[:-1], lora_B.shape[0]))
    h = x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]))
    computed = weight.new_empty(lora_B.shape[0] if norm is None else 0, dtype=accumulate_dtype(weight.dtype))
    return y, h, computed, torch.empty_like(computed)


def _asked_for(mask: int, like: tuple) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if mask >> i & 1 else like[0].new_empty(0)
        for i, t in enumerate(like)
    )


@fake("linear_forward_cached")
def _(x, weight, lora_A, lora_B, magnitude, bias, scaling, transposed, cached, fingerprint, epoch=0):
    h = x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]))
    return x.new_empty((*x.shape[:-1], lora_B.shape[0])), h, torch.empty_like(cached), torch.empty_like(cached)


@fake("linear_backward")
def _(grad_y, y, x, h, weight, lora_A, lora_B, magnitude, bias, norm, gain, scaling, transposed, mask):
    return _asked_for(mask, (x, lora_A, lora_B, magnitude, bias))


@fake("adapter_backward")
def _(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype=None):
    magnitude = norm if magnitude_dtype is None else norm.to(magnitude_dtype)
    return _asked_for(mask, (grad, h, lora_B, magnitude, norm))


def once(backward: Callable) -> Callable:
    """once_differentiable, which costs as much as a small launch, only where a graph of gradients is wanted: elsewhere
    it has nothing to do."""
    checked = once_differentiable(backward)
    return lambda ctx, grad: (checked if torch.is_grad_enabled() else backward)(ctx, grad)


def save(ctx, inputs: tuple, constants: tuple, y: Tensor | None) -> None:
    """What backward needs, for `saved`. `constants` are small, and nobody trains them.

    Under activation checkpointing a saved tensor goes through Python three times (forward, recomputation, backward),
    which costs the host as much as a small launch. Constants aren't worth it: the node itself holds them.
    """
    if torch.compiler.is_compiling():  # whose graphs keep what is saved
        ctx.save_for_backward(*inputs, *constants, y)
        ctx.constants = ()
        return
    ctx.save_for_backward(*inputs, y)
    ctx.constants, ctx.versions = constants, (_versions(inputs), _versions(constants))


def saved(ctx) -> tuple[Tensor | None, ...]:
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


def like_magnitude(ctx, gain: Tensor) -> Tensor:
    """In m's place: a backward op asks it for shape and dtype alone, and this way it need not be saved."""
    return gain if gain.dtype == ctx.magnitude_dtype else torch.empty_like(gain, dtype=ctx.magnitude_dtype)


def _versions(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def add_product(y: Tensor, rest: Tensor, weight_t: Tensor) -> Tensor:
    """y (..., out) + rest (..., in) weight_t (in, out): what dropout took away still goes through the base layer, added
    inside the product, which is one rounding less."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), rest.reshape(-1, rest.shape[-1]), weight_t).view(y.shape)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    transposed: bool = False,
    norm: Tensor | None = None,
    gain: Tensor | None = None,
    cache: NormCache | None = None,
) -> Tensor:
    """y = g * (x W^T + s (x A^T) B^T) + bias, g = magnitude / |W + s B A|: DoRA (arXiv 2402.09353, equation 5).

    The norm is a constant of the backward pass (section 4.3).

    Args:
        x: (..., in), bfloat16, float16, float32 or float64; under autocast in autocast's dtype.
        weight: W (out, in), or (in, out) when `transposed`; the dtype of x. It gets no gradient.
        lora_A, lora_B, magnitude, bias: (r, in), (out, r), (out,), (out,); may be of a wider dtype than x. Their
            gradients come back in their own dtype, summed in float32.
        norm, gain: (out,), from `norm_and_gain`, if at hand; otherwise they are computed here...
        cache: ...which reuses the norm while nothing changed.

    Returns:
        (..., out) in x's (or autocast's) dtype.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; the message names the argument.
    """
    require()
    if (norm is None) != (gain is None):
        raise ValueError("dora_linear: norm and gain: expected both or neither")
    dtype = autocast_dtype(x)
    if dtype is not None:
        if weight.dtype != dtype and norm is None:
            # The norm is that of the weight as stored, not of its rounded copy.
            norm, gain = norm_and_gain(
                weight, lora_A, lora_B, magnitude, scaling=scaling, transposed=transposed, cache=cache
            )
        x, weight = x.to(dtype), weight.detach().to(dtype)
    state = ()
    if cache is not None and norm is None:
        state = cache.state((weight, lora_A, lora_B), (scaling, transposed), lora_B.shape[0])
    op = torch.ops.dora_ext.linear.default
    return op(x, weight, lora_A, lora_B, magnitude, bias, norm, gain, float(scaling), transposed, *state)
