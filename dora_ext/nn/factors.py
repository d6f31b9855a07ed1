"""A and B as PEFT hands them over, as modules: whether their weights may be read, and how to do without."""

import torch
from torch import Tensor, nn

from ..ops._registry import without_autocast

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hooked(m: nn.Module) -> bool:
    """Calling it runs hooks of its own."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def are_plain(*modules: nn.Module) -> bool:
    """Calling them would do nothing but apply their weights: no wrapper or subclass (FSDP's), hooks, bias, DTensor."""
    return all(
        type(m) in _PLAIN and m.bias is None and type(m.weight) in (Tensor, nn.Parameter) and not hooked(m)
        for m in modules
    )


def matrix_of(module: nn.Module, features: int) -> Tensor:
    """The matrix (out, features) that a linear module multiplies with, found by calling it, as FSDP asks for."""
    like = next(module.parameters())
    eye = torch.eye(features, device=like.device, dtype=like.dtype)
    with without_autocast(like.device):
        return (module(eye) - module(torch.zeros_like(eye[:1]))).T
