"""DoRA in plain PyTorch: the truth that every kernel is compared with, and the page to read first.

DoRA (arXiv 2402.09353, equation 5) writes a weight as a magnitude per output feature times a direction,

    W' = m * (W + s B A) / |W + s B A|        the norm by output feature

and holds the norm constant in the backward pass (section 4.3): it is detached here. Every function works in the
dtype that it is given, so call it with float64 tensors for the truth.

Shapes: x (..., in), W (out, in), A (r, in), B (out, r), m (out,), bias (out,); s is a number, alpha / r.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, transposed: bool = False) -> Tensor:
    """n (out,) = |W + s B A|, one norm per output feature. `transposed`: W is (in, out), as GPT-2's Conv1D keeps it.

    A convolution's W (out, in / groups, *k) and A (r, in, *k) are flattened behind their first dimension.
    """
    if weight.dim() > 2:
        return effective_conv_weight(weight, lora_A, lora_B, scaling).flatten(1).norm(dim=1)
    weight = weight.T if transposed else weight
    return (weight + scaling * lora_B @ lora_A).norm(dim=1)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n, and 0 where n = 0: a feature whose weights are all zero gives its bias and no gradient."""
    return torch.where(norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(norm))


def linear(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, transposed=False) -> Tensor:
    """y = g * (x W^T + s (x A^T) B^T) + bias, differentiable in x, A, B, m and bias."""
    norm = weight_norm(weight, lora_A, lora_B, scaling, transposed).detach()
    base = x @ (weight if transposed else weight.T)
    y = gain(magnitude, norm) * (base + scaling * (x @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def linear_dropout(x, dropped, weight, lora_A, lora_B, magnitude, scaling, bias=None, transposed=False) -> Tensor:
    """Training with dropout, as PEFT has it: y = W x + bias + (g - 1) * W x_d + g * s B A x_d, x_d = dropout(x)."""
    weight_t = weight if transposed else weight.T
    y = linear(dropped, weight, lora_A, lora_B, magnitude, scaling, None, transposed) + (x - dropped) @ weight_t
    return y if bias is None else y + bias


def embedding(ids, weight, lora_A, lora_B, magnitude, scaling, padding_idx=None, embed_scale=1.0) -> Tensor:
    """y = g * (W[ids] + s A[:, ids]^T B^T); W (vocab, dim), A (r, vocab), B (dim, r), m and n (dim,).

    `padding_idx`: that row is looked up like any other, and its column of A gets no gradient. `embed_scale`
    multiplies the adapter's part; the base layer's part arrives already scaled in models that have one, so here the
    whole row is scaled, after the norm was taken of the unscaled weights.
    """
    norm = weight_norm(weight, lora_A, lora_B, scaling, transposed=True).detach()
    rows = F.embedding(ids, lora_A.T, padding_idx=padding_idx)
    return gain(magnitude, norm) * embed_scale * (F.embedding(ids, weight) + scaling * rows @ lora_B.T)


def effective_conv_weight(weight, lora_A, lora_B, scaling) -> Tensor:
    """W + s B A of a convolution as one dense kernel (out, in, *k).

    W (out, in / groups, *k); A (r, in, *k) is a dense convolution; B (out, r / groups, 1...) is grouped like W, so
    that an output channel of group q sees the ranks of group q, over all input channels.
    """
    out, in_channels = weight.shape[0], lora_A.shape[1]
    groups = in_channels // weight.shape[1]
    dense = weight.new_zeros(out, *lora_A.shape[1:])
    per_out, per_in, per_rank = out // groups, weight.shape[1], lora_A.shape[0] // groups
    for q in range(groups):
        rows, ranks = slice(q * per_out, (q + 1) * per_out), slice(q * per_rank, (q + 1) * per_rank)
        dense[rows, q * per_in : (q + 1) * per_in] = weight[rows]
        delta = lora_B[rows].flatten(1) @ lora_A[ranks].flatten(1)
        dense[rows] = dense[rows] + scaling * delta.view(per_out, *lora_A.shape[1:])
    return dense


def conv(x, weight, lora_A, lora_B, magnitude, scaling, bias=None, stride=1, padding=0, dilation=1) -> Tensor:
    """y = g * conv(x, W + s B A) + bias for x (batch, in, ...) in one, two or three dimensions."""
    conv_fn = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    effective = effective_conv_weight(weight, lora_A, lora_B, scaling)
    g = gain(magnitude.flatten(), effective.detach().flatten(1).norm(dim=1))
    # The gain scales the output, not the weight, so that the norm stays detached while A and B keep their gradient.
    shape = (1, -1) + (1,) * (weight.dim() - 2)
    y = g.view(shape) * conv_fn(x, effective, None, stride, padding, dilation)
    return y if bias is None else y + bias.view(shape)
