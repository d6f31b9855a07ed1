"""DoRA's convolutions: y = g * (conv(x, W) + s B conv(x, A)) + bias, B a 1x1 convolution, g = m / n by channel."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._load import require
from ._registry import autocast_dtype, without_autocast
from .compose import adapter_sums
from .features import feature_products, times_matrix
from .norm import norm_and_gain

_aten = torch.ops.aten


class _DoraConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, lora_A, lora_B, magnitude, bias, norm, gain, scaling, stride, padding, dilation, groups
    ):
        base = _aten.convolution(x, weight, None, stride, padding, dilation, False, [0], groups)
        h = _aten.convolution(x, lora_A.to(x.dtype), None, stride, padding, dilation, False, [0], 1)
        dense_B = _dense(lora_B, groups)
        # Not in place: base is kept for the magnitude's gradient, and convolutions are so often followed by an
        # in-place activation that the output could not be kept instead.
        y = torch.ops.dora_ext.compose.default(base, h, dense_B, gain, bias, scaling, False, True)
        ctx.geometry = (stride, padding, dilation)
        ctx.scaling, ctx.groups = scaling, groups
        ctx.magnitude_like = magnitude.shape, magnitude.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, h, base if ctx.needs_input_grad[4] else None, weight, lora_A, lora_B, norm, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with without_autocast(grad.device):
            return _DoraConv._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        x, h, base, weight, lora_A, lora_B, norm, gain = ctx.saved_tensors
        need_x, _, need_A, need_B, need_m, need_bias = ctx.needs_input_grad[:6]
        scaling, groups, geometry = ctx.scaling, ctx.groups, (*ctx.geometry, False, [0])
        dx = dA = dB = dm = db = None
        if need_m or need_bias:
            _, dm, db = torch.ops.dora_ext.compose_backward.default(
                grad, grad if base is None else base, norm, gain, None, False, False, True, False
            )
        if need_B or need_m:
            sums = _own_groups(feature_products(grad, h, True), groups)
            grad_B, adapter_dm = adapter_sums(sums, lora_B.flatten(1), norm, gain, scaling)
            dB = grad_B.view_as(lora_B)
            dm = dm + adapter_dm if need_m else None
        # The gain goes to the weights, of which there are few, and G = g dY is never made.
        merged = need_x and groups == 1 and weight.numel() <= x.numel()
        if need_x or need_A:
            gained_B = gain[:, None] * (scaling * _dense(lora_B, groups))
        if need_A or (need_x and not merged):
            P = times_matrix(grad, gained_B.to(x.dtype), True)
            wanted = [need_x and not merged, need_A, False]
            dx, dA, _ = _aten.convolution_backward(P, x, lora_A.to(x.dtype), None, *geometry, 1, wanted)
            dA = dA.to(lora_A.dtype) if need_A else None
        if need_x:
            W = gain[:, None] * weight.flatten(1)
            if merged:
                # B A is of the weight's size here: one convolution does, where its passes over dX would be more.
                W = torch.addmm(W, gained_B.to(W.dtype), lora_A.flatten(1).to(W.dtype))
            W = W.to(x.dtype).view(weight.shape)
            dx_W = _aten.convolution_backward(grad, x, W, None, *geometry, groups, [True, False, False])[0]
            dx = dx_W if merged else dx_W.add_(dx)
        shape, dtype = ctx.magnitude_like
        dm = dm.to(dtype).view(shape) if need_m else None
        db = db.to(ctx.bias_dtype) if need_bias else None
        return dx, None, dA, dB if need_B else None, dm, db, *([None] * 7)


def _dense(lora_B: Tensor, groups: int) -> Tensor:
    """A grouped 1x1 kernel (out, r / groups, 1, ...) as a matrix (out, r) with zeros between the groups."""
    matrix = lora_B.flatten(1)
    return matrix if groups == 1 else torch.block_diag(*matrix.chunk(groups))


def _own_groups(matrix: Tensor, groups: int) -> Tensor:
    """_dense undone: of (out, r), what lies within the groups, (out, r / groups)."""
    if groups == 1:
        return matrix
    out, r = matrix.shape
    blocks = matrix.view(groups, out // groups, groups, r // groups)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(out, r // groups)


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
    weight = weight.detach()
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"dora_conv: x: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    stride, dilation = _tuple(stride, spatial), _tuple(dilation, spatial)
    sides = _padding(padding, weight.shape[2:], dilation)
    if padding_mode != "zeros" or any(a != b for a, b in sides):
        # F.pad counts from the last dimension.
        flat = [n for pair in reversed(sides) for n in pair]
        x = F.pad(x, flat, mode="constant" if padding_mode == "zeros" else padding_mode)
        sides = [(0, 0)] * spatial
    with without_autocast(x.device):
        return _DoraConv.apply(
            x, weight, lora_A, lora_B, magnitude, bias, norm, gain, float(scaling), stride, [a for a, _ in sides],
            dilation, groups,
        )  # fmt: skip


def _check_conv(x, weight, lora_A, lora_B, groups) -> None:
    spatial, r = weight.dim() - 2, lora_A.shape[0]
    expected_A = (r, weight.shape[1] * groups, *weight.shape[2:])
    expected_B = (weight.shape[0], r // groups, *([1] * spatial))
    if r < 1 or r % groups:
        raise ValueError(f"dora_conv: lora_A: expected a rank divisible by groups={groups}, got {r}")
    for name, got, expected in (("lora_A", lora_A.shape, expected_A), ("lora_B", lora_B.shape, expected_B)):
        if tuple(got) != expected:
            raise ValueError(f"dora_conv: {name}: expected shape {expected}, got {tuple(got)}")
    if x.dim() != spatial + 2 or x.shape[1] != expected_A[1]:
        raise ValueError(
            f"dora_conv: x: expected shape (batch, {expected_A[1]}, {spatial} spatial sizes), got {tuple(x.shape)}"
        )


def _tuple(value, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value)


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
