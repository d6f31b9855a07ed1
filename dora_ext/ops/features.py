"""Products over an array's features, which are its last dimension or, `channels_first`, its second: B as a 1x1
convolution, and its gradients. Nothing of the array's size is copied, whether memory has the features last or the
positions; libraries' convolutions with few channels do so to both of their arrays."""

import torch
from torch import Tensor


def _rows(t: Tensor, channels_first: bool) -> Tensor | None:
    """(positions, features), or None where that would be a copy."""
    if channels_first:
        t = t.movedim(1, -1)
        if not t.is_contiguous():
            return None
    return t.reshape(-1, t.shape[-1])


def times_matrix(t: Tensor, matrix: Tensor, channels_first: bool) -> Tensor:
    """The features of t (..., n) times matrix (n, r): (..., r), or (batch, r, ...) from (batch, n, ...)."""
    rows = _rows(t, channels_first)
    if rows is None:
        flat = t.flatten(2)
        return torch.bmm(matrix.T.expand(len(t), -1, -1), flat).unflatten(2, t.shape[2:])
    product, r = rows @ matrix, matrix.shape[1]
    if channels_first:
        return product.view(t.shape[0], *t.shape[2:], r).movedim(-1, 1)
    return product.view(*t.shape[:-1], r)


def feature_products(t: Tensor, h: Tensor, channels_first: bool) -> Tensor:
    """(n, r): the sum over all positions of the features of t (..., n) times those of h (..., r)."""
    rows = _rows(t, channels_first)
    if rows is None:
        by_batch = torch.bmm(t.flatten(2), h.flatten(2).mT)
        return by_batch.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))
    h = h.movedim(1, -1) if channels_first else h
    return rows.T @ h.reshape(-1, h.shape[-1])
