"""The weight norm: n = |W + s B A| per output feature, and the gain g = m / n."""

import torch
from torch import Tensor

from .._load import require
from ..norm_cache import NormCache
from ._registry import accumulate_dtype, call_layer, fake


@fake("norm")
def _(weight, lora_A, lora_B, magnitude, scaling, transposed=False):
    norm = weight.new_empty(lora_B.shape[0], dtype=accumulate_dtype(weight.dtype))
    return norm, torch.empty_like(norm)


@fake("norm_cached")
def _(weight, lora_A, lora_B, magnitude, scaling, transposed, cached, fingerprint, epoch=0):
    return torch.empty_like(cached), torch.empty_like(cached)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float, transposed: bool = False) -> Tensor:
    """The norm of each output feature of W + s B A (DoRA, arXiv 2402.09353, equation 5), without forming B A.

    Args:
        weight: W (out, in), or (in, out) when `transposed`; of a convolution (out, in / groups, *kernel).
        lora_A: (r, in), of a convolution (r, in, *kernel).
        lora_B: (out, r), of a convolution (out, r / groups, 1, ...).
        scaling: s, a finite number.

    Returns:
        (out,), float64 for a float64 weight, otherwise float32. It carries no gradient (section 4.3).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; the message names the argument.
    """
    return norm_and_gain(
        weight, lora_A, lora_B, lora_B.new_zeros(lora_B.shape[0]), scaling=scaling, transposed=transposed
    )[0]


def norm_and_gain(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    transposed: bool = False,
    cache: NormCache | None = None,
    stored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """n (out,) as `weight_norm`, and g = magnitude / n, 0 where n = 0. `cache` reuses n while nothing changed.

    stored: what the cache is to know the weight by, where the weight is unpacked from it anew each time. magnitude
    holds `out` numbers in any shape. Neither result carries a gradient.
    """
    require()
    dims = weight.dim()
    if dims > 2 and lora_A.dim() == dims and lora_A.shape[1] != weight.shape[1]:
        with torch.no_grad():
            norm = _grouped_conv_norm(weight, lora_A, lora_B, scaling)
            magnitude = magnitude.flatten().to(norm.dtype)
            return norm, torch.where(norm > 0, magnitude / norm, 0.0)

    state = ()
    if cache is not None:
        known_by = (weight if stored is None else stored, lora_A, lora_B)
        state = cache.state(known_by, (scaling, transposed), lora_B.shape[0])
    # Not under no_grad, whose coming and going costs as much as a small launch: these ops record nothing (ops.cpp).
    if dims <= 2 and magnitude.dim() != 1:
        magnitude = magnitude.flatten()
    op = "norm_cached" if state else "norm"
    return call_layer(op, weight, lora_A, lora_B, magnitude, scaling, transposed, *state)


def _grouped_conv_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Groups > 1: an output channel of group q has W in its own input channels, and s B_q A_q over all of them (A is a
    dense convolution). Own channels through the kernel; the rest, s B_q A_rest, through its small Gram matrix."""
    groups = lora_A.shape[1] // weight.shape[1]
    norms = []
    for w, b, (q, a) in zip(weight.chunk(groups), lora_B.chunk(groups), enumerate(lora_A.chunk(groups)), strict=True):
        own = slice(q * w.shape[1], (q + 1) * w.shape[1])
        zeros = b.new_zeros(b.shape[0])
        norm, _ = torch.ops.dora_ext.norm.default(w, a[:, own], b, zeros, scaling)
        rest = torch.cat([a[:, : own.start], a[:, own.stop :]], 1).flatten(1).to(norm.dtype)
        b = scaling * b.flatten(1).to(norm.dtype)
        # Sums of products, not matrix products: those autocast would round.
        gram = torch.stack([(rest * row).sum(1) for row in rest])
        squares = (b * (b[:, None, :] * gram).sum(2)).sum(1)
        norms.append(torch.sqrt(norm**2 + squares.clamp_min(0)))
    return torch.cat(norms)
