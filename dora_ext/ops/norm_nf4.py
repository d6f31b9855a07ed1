"""The weight norm straight from a weight packed in NF4: n = |W + s B A| per output feature, and the gain g = m / n."""

import torch
from torch import Tensor

from .._load import require
from ..norm_cache import NormCache
from ._registry import fake
from .nf4 import NF4Tensor


@fake("norm_nf4")
def _(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, magnitude, scaling):  # fmt: skip
    norm = packed.new_empty(lora_B.shape[0], dtype=torch.float32)
    return norm, torch.empty_like(norm)


@fake("norm_nf4_cached")
def _(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
      lora_A, lora_B, magnitude, scaling, cached, fingerprint, epoch=0):  # fmt: skip
    return torch.empty_like(cached), torch.empty_like(cached)


def weight_norm_nf4(q: NF4Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """The norm of each output feature of W + s B A (DoRA, arXiv 2402.09353, equation 5) for a W packed in NF4.

    W's values are those of dequantize_nf4(q). No more than a few rows of them exist at a time.

    Args:
        q: W (out, in). lora_A: (r, in). lora_B: (out, r). scaling: s, a finite number.

    Returns:
        (out,) float32. It carries no gradient (section 4.3).

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or quantisation state that do not fit; the message says which.
    """
    return norm_and_gain_nf4(q, lora_A, lora_B, lora_B.new_zeros(lora_B.shape[0]), scaling=scaling)[0]


def norm_and_gain_nf4(
    q: NF4Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    cache: NormCache | None = None,
) -> tuple[Tensor, Tensor]:
    """n (out,) as `weight_norm_nf4`, and g = magnitude / n, 0 where n = 0. Neither carries a gradient.

    `cache` reuses n while the packed bytes, the scales, A and B are the same tensors at the same versions, no optimizer
    has stepped, and a fingerprint of all of A, B and the scales and of a sample of the packed bytes has not moved.
    What it cannot see: single packed bytes written past torch under unchanged scales (`invalidate_norms` is for that).
    """
    require()
    # Not under no_grad, as in norm_and_gain.
    magnitude = magnitude if magnitude.dim() == 1 else magnitude.flatten()
    state = kept_norms(q, lora_A, lora_B, scaling, cache)
    op = torch.ops.dora_ext.norm_nf4_cached if state else torch.ops.dora_ext.norm_nf4
    return op.default(*q.operands(), lora_A, lora_B, magnitude, scaling, *state)


def kept_norms(q: NF4Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, cache: NormCache | None) -> tuple:
    """(cached, fingerprint, epoch) for an op that takes them; () without a cache, and where nothing can be kept."""
    if cache is None:
        return ()
    scales = (q.absmax, q.nested_absmax, q.nested_code, q.offset) if q.nested else (q.absmax,)
    constants = (scaling, q.blocksize, q.nested_blocksize, q.shape, q.dtype)
    return cache.state((q.packed, lora_A, lora_B, *scales), constants, lora_B.shape[0])
