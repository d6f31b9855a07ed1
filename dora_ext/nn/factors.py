"""A and B as PEFT hands them over, as modules: whether their weights may be read, and how to do without."""

import torch
from torch import Tensor, nn

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def are_plain(*modules: nn.Module) -> bool:
    """Calling them would do nothing but apply their weights: no wrapper or subclass (FSDP's), hooks, bias, DTensor."""
    return all(
        type(m) in _PLAIN
        and m.bias is None
        and type(m.weight) in (Tensor, nn.Parameter)
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )


def matrix_of(module: nn.Module, features: int) -> Tensor:
    """The matrix (out, features) that a linear module multiplies with, found by calling it, as FSDP asks for."""
    like = next(module.parameters())
    eye = torch.eye(features, device=like.device, dtype=like.dtype)
    with torch.autocast(like.device.type, enabled=False):
        return (module(eye) - module(torch.zeros_like(eye[:1]))).T
