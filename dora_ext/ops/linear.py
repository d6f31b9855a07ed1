"""DoRA's linear layer: y = g * (x W^T + s (x A^T) B^T) + bias, g = m / |W + s B A|. Its autograd node is in C++."""

import torch
from torch import Tensor

from .._load import require
from ..distributed import hold_past_hooks
from ..norm_cache import NO_NORMS, NormCache
from ._registry import accumulate_dtype, autocast_dtype, call_layer, fake, in_dtype
from .norm import norm_and_gain


@fake("linear")
def _(x, weight, lora_A, lora_B, *_constants):
    return x.new_empty((*x.shape[:-1], lora_B.shape[0]))


@fake("linear_forward")
def _(x, weight, lora_A, lora_B, magnitude, bias, norm, gain, scaling, transposed=False):
    y = x.new_empty((*x.shape[:-1], lora_B.shape[0]))
    h = x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]))
    computed = weight.new_empty(lora_B.shape[0] if norm is None else 0, dtype=accumulate_dtype(weight.dtype))
    return y, h, computed, torch.empty_like(computed)


def asked_for(mask: int, like: tuple) -> tuple[Tensor, ...]:
    """The fake results of a backward op: gradients where `mask` has a bit, else something empty."""
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
    return asked_for(mask, (x, lora_A, lora_B, magnitude, bias))


@fake("adapter_backward")
def _(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype=None):
    magnitude = norm if magnitude_dtype is None else norm.to(magnitude_dtype)
    return asked_for(mask, (grad, h, lora_B, magnitude, norm))


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
        x, weight = in_dtype(x, dtype), in_dtype(weight, dtype)
    state = ()
    if cache is not None and norm is None:
        state = cache.state((weight, lora_A, lora_B), (scaling, transposed), lora_B.shape[0])
    held = hold_past_hooks((weight, lora_A, lora_B, bias))
    return call_layer(
        "linear", x, weight, lora_A, lora_B, magnitude, bias, norm, gain, float(scaling), transposed,
        *(state or NO_NORMS), held,
    )  # fmt: skip
