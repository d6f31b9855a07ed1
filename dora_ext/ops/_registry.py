"""Fake (shape-only) kernels wait here until the C++ library is loaded, since torch registers them only on ops that exist."""

from collections.abc import Callable

import torch

_pending: list[tuple[str, Callable]] = []
_loaded = False


def fake(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the fake kernel of `dora_ext::name`."""

    def decorate(fn: Callable) -> Callable:
        if _loaded:
            torch.library.register_fake(f"dora_ext::{name}", fn)
        else:
            _pending.append((name, fn))
        return fn

    return decorate


def activate() -> None:
    """Called once, right after the C++ library is loaded."""
    global _loaded
    _loaded = True
    while _pending:
        name, fn = _pending.pop()
        torch.library.register_fake(f"dora_ext::{name}", fn)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, gains and sums: fp64 for fp64, else fp32 (accumulate_type in csrc/check.h)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
