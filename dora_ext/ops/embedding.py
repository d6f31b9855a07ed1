"""DoRA's embedding: y = g * (W[ids] + s A[:, ids]^T B^T), one magnitude and one norm per embedding dimension. Its
autograd node is in C++."""

import torch
from torch import Tensor

from .. import _load
from .._load import require
from ..distributed import hold_past_hooks
from ._registry import call_layer, fake
from .norm import norm_and_gain


@fake("embedding")
@fake("embedding_forward")
def _(ids, weight, *_constants):
    return weight.new_empty((*ids.shape, weight.shape[1]))


@fake("embedding_backward")
def _(grad_y, ids, weight, lora_A, lora_B, norm, gain, scaling, embed_scale, padding_idx, scale_grad_by_freq, mask,
      magnitude_dtype=None):  # fmt: skip
    magnitude = norm if magnitude_dtype is None else norm.to(magnitude_dtype)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if mask >> i & 1 else weight.new_empty(0)
        for i, t in enumerate((lora_A, lora_B, magnitude))
    )


def dora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    embed_scale: float = 1.0,
    norm: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = embed_scale * g * (W[ids] + s A[:, ids]^T B^T), g = magnitude / n, n per dimension over the whole vocabulary.

    Args:
        ids: any shape, int32 or int64, in [0, vocab).
        weight: W (vocab, dim); it gets no gradient. lora_A: (r, vocab). lora_B: (dim, r). magnitude: (dim,).
        padding_idx: its column of A gets no gradient. max_norm, norm_type: rows of W, and then of A^T, that are
            looked up are first scaled down in place, as F.embedding does. scale_grad_by_freq: as F.embedding.
        embed_scale: factor on the result, for models that scale their embeddings; the norm is of the unscaled weights.
        norm, gain: (dim,), from `norm_and_gain(..., transposed=True)`, if at hand.

    Returns:
        (*ids.shape, dim) in weight's dtype.

    Raises:
        IndexError: an id out of range. On CUDA this looks at the ids, and so waits for them; under torch.compile and
            while a CUDA graph is captured it cannot, and such an id gives a row of NaN.
        ValueError, TypeError: shapes, devices or dtypes that do not fit; the message names the argument.
    """
    require()
    vocab = weight.shape[0]
    _check_ids(ids, vocab)
    if padding_idx is not None and not -vocab <= padding_idx < vocab:
        raise ValueError(f"dora_embedding: padding_idx: expected it in [-{vocab}, {vocab}), got {padding_idx}")
    if max_norm is not None:
        _renorm(weight, ids, max_norm, norm_type)
        norm = gain = None
    if norm is None or gain is None:
        norm, gain = norm_and_gain(weight, lora_A, lora_B, magnitude, scaling=scaling, transposed=True)
    if max_norm is not None:
        with torch.no_grad():
            rows = lora_A.detach().T.contiguous()
            _renorm(rows, ids, max_norm, norm_type)
            lora_A.copy_(rows.T)
    padding = -1 if padding_idx is None else padding_idx % vocab
    held = hold_past_hooks((weight, lora_A, lora_B))
    return call_layer(
        "embedding", ids, weight, lora_A, lora_B, magnitude, norm, gain, float(scaling), float(embed_scale), padding,
        scale_grad_by_freq, held,
    )  # fmt: skip


def _renorm(rows: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> None:
    with torch.no_grad():
        torch.embedding_renorm_(rows.detach(), ids.contiguous(), max_norm, norm_type)


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"dora_embedding: ids: expected int64 or int32, got {ids.dtype}")
    if torch.compiler.is_compiling() or ids.is_meta or ids.numel() == 0:
        return
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = _load.module.id_range(ids)
    if low < 0 or high >= vocab:
        raise IndexError(f"dora_embedding: ids: expected values in [0, {vocab}), got {low if low < 0 else high}")
