"""Fake (shape-only) kernels, registered once the C++ library is loaded: torch takes them only for ops that exist."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from .. import _load
from .._load import when_loaded


def fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the fake kernel of `dora_ext::name`."""

    def decorate(fn: Callable) -> Callable:
        when_loaded(partial(torch.library.register_fake, f"dora_ext::{name}", fn))
        return fn

    return decorate


def call_layer(name: str, *args):
    """A layer's op or its norm's, called in every forward, past what torch.ops takes the host for it."""
    if not torch.compiler.is_compiling():
        result = getattr(_load.module, name)(*args)
        if result is not NotImplemented:
            return result
    return getattr(torch.ops.dora_ext, name).default(*args)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, gains and sums: fp64 for fp64, else fp32 (accumulate_type in csrc/check.h)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), asked first: a cast to what t is takes the host, in a forward, as long as a small launch."""
    return t if t.dtype == dtype else t.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, where it is on, has chosen for x's products; it leaves float64 alone."""
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # whose making takes as long as all the rest
    if kind == "meta":  # which autocast does not know
        return None
    on = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products keep their operands' dtype."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
