"""DoRA's convolutions: y = g * (conv(x, W) + s B conv(x, A)) + bias, B a 1x1 convolution, g = m / n by channel. Their
autograd node is in C++."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._load import require
from ..distributed import hold_past_hooks
from ._registry import autocast_dtype, call_layer, fake, in_dtype
from .norm import norm_and_gain


@fake("conv")
def _(x, weight, lora_A, lora_B, magnitude, bias, norm, gain, scaling, stride, padding, dilation, groups, held=False):
    # With the strides that the library chooses.
    base = torch.ops.aten.convolution.default(x, weight, None, stride, padding, dilation, False, [0], groups)
    return torch.empty_like(base)


def dora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
    norm: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """DoRA (arXiv 2402.09353, equation 5) for a convolution in one to three dimensions, one norm per output channel.

    Args:
        x: (batch, in, *spatial) or (in, *spatial), any float dtype; under autocast in autocast's dtype.
        weight: W (out, in / groups, *kernel), the dtype of x; it gets no gradient.
        lora_A: (r, in, *kernel), a dense convolution with the base's geometry. lora_B: (out, r / groups, 1, ...).
        magnitude: `out` numbers in any shape. bias: (out,). All four may be wider than x.
        stride, padding (numbers, 'same', 'valid'), dilation, groups, padding_mode: as torch.nn.Conv2d has them.
        norm, gain: (out,), from `norm_and_gain`, if at hand.

    Returns:
        (batch, out, *spatial) in x's (or autocast's) dtype.
    """
    require()
    spatial = weight.dim() - 2
    if spatial not in (1, 2, 3):
        raise ValueError(f"dora_conv: weight: expected 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() == spatial + 1:
        y = dora_conv(
            x[None], weight, lora_A, lora_B, magnitude, bias, scaling=scaling, stride=stride, padding=padding,
            dilation=dilation, groups=groups, padding_mode=padding_mode, norm=norm, gain=gain,
        )  # fmt: skip
        return y[0]
    _check_conv(x, weight, lora_A, lora_B, groups)
    if norm is None or gain is None:
        norm, gain = norm_and_gain(weight, lora_A, lora_B, magnitude, scaling=scaling)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = in_dtype(x, dtype), in_dtype(weight, dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"dora_conv: x: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    stride, dilation = _tuple(stride, spatial), _tuple(dilation, spatial)
    if padding_mode == "zeros" and not isinstance(padding, str):
        zeros = _tuple(padding, spatial)
    else:
        sides = _padding(padding, weight.shape[2:], dilation)
        zeros = tuple(a for a, _ in sides)
        if padding_mode != "zeros" or any(a != b for a, b in sides):
            # F.pad counts from the last dimension.
            flat = [n for pair in reversed(sides) for n in pair]
            x = F.pad(x, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
            zeros = (0,) * spatial
    held = hold_past_hooks((weight, lora_A, lora_B))
    return call_layer(
        "conv", x, weight, lora_A, lora_B, magnitude, bias, norm, gain, float(scaling), stride, zeros, dilation, groups,
        held,
    )  # fmt: skip


def _check_conv(x, weight, lora_A, lora_B, groups) -> None:
    out, inputs, *kernel = weight.shape
    inputs *= groups
    r = lora_A.shape[0]
    if r < 1 or r % groups:
        raise ValueError(f"dora_conv: lora_A: expected a rank divisible by groups={groups}, got {r}")
    expected_A, expected_B = (r, inputs, *kernel), (out, r // groups, *([1] * len(kernel)))
    for name, got, expected in (("lora_A", lora_A.shape, expected_A), ("lora_B", lora_B.shape, expected_B)):
        if got != expected:
            raise ValueError(f"dora_conv: {name}: expected shape {expected}, got {tuple(got)}")
    if x.dim() != weight.dim() or x.shape[1] != inputs:
        raise ValueError(
            f"dora_conv: x: expected shape (batch, {inputs}, {len(kernel)} spatial sizes), got {tuple(x.shape)}"
        )


def _tuple(value, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _padding(padding, kernel, dilation) -> list[tuple[int, int]]:
    """Zeros before and after each spatial dimension; 'same' puts the odd one after, as torch does."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    if isinstance(padding, str):
        raise ValueError(f"dora_conv: padding: expected numbers, 'same' or 'valid', got {padding!r}")
    return [(p, p) for p in _tuple(padding, len(kernel))]
