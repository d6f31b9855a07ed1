"""Bitsandbytes' layers: base products that are not ours, with gain and adapter in one pass over them; packed weights.

Linear4bit: the norm comes from the packed weight (NF4), which is dequantised for the product and again in backward.
Linear8bitLt: the base product is bitsandbytes' own (it quantises the input, too); the gradient of x goes through the
dequantised weight, as bitsandbytes' does.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ...nn.base_weight import dense_in, dense_weight, packed_weight, parameter_of
from ...norm_cache import NormCache
from ...ops import norm_and_gain
from ...ops._registry import in_dtype, without_autocast
from ...ops.linear_nf4 import linear_packed, linear_unpacked


def quantised_linear(
    base: nn.Module, x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, m: Tensor, *, scaling: float, cache: NormCache
) -> Tensor:
    """DoRA over bitsandbytes' Linear4bit or Linear8bitLt `base` (arXiv 2402.09353, equation 5).

    x: (..., in), any float dtype. dropped: x after dropout, or x itself (with Linear8bitLt always). A (r, in),
    B (out, r), m (out,). Returns (..., out) in x's dtype.
    """
    four_bit = hasattr(base, "compute_dtype")
    dtype = _compute_dtype(base, x) if four_bit else x.dtype
    inputs, rest = in_dtype(dropped, dtype), None if dropped is x else (x - dropped).to(dtype)
    bias = parameter_of(base, "bias")
    packed = packed_weight(base) if four_bit else None
    if packed is not None:
        y = linear_packed(inputs, packed, (A, B, m), bias, scaling=scaling, cache=cache, rest=rest)
        return in_dtype(y, x.dtype)
    with without_autocast(x.device):  # as bitsandbytes' products, which know no autocast
        dense = dense_weight(base)
        norm, gain = norm_and_gain(dense, A, B, m, scaling=scaling, cache=cache, stored=base.weight)
        y = linear_unpacked(
            inputs, dense.to(dtype), partial(dense_in, base, dtype), (A, B, m), bias, norm, gain,
            scaling=scaling, rest=rest, product=None if four_bit else base.forward,
        )  # fmt: skip
    return y.to(x.dtype)


def _compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """As Linear4bit's forward chooses it, the first input deciding."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return x.dtype if base.compute_dtype is None else base.compute_dtype
