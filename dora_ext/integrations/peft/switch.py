"""Switching PEFT over to our kernels and back.

PEFT's classes are patched, not its instances: models made before `enable()` run on our kernels too, and `disable()`
puts PEFT's own functions back, the very same objects. Layers made in between hold our layer classes, which PEFT's code
takes for its own, and go on working after `disable()` and out of a pickle.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import layers as our_layers
from ...norm_cache import NormCache
from .forwards import switched

OLDEST, NEWEST = (0, 18), (0, 21)  # PEFT's releases that the tests were run with

_DORA_CLASSES = (
    "DoraLinearLayer", "DoraEmbeddingLayer",
    "_DoraConvNdLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer",
)  # fmt: skip
_MISSING = object()
_replaced: list[tuple[Any, str, Any]] = []  # owner, name, what was there


def is_enabled() -> bool:
    """Whether `enable()` is in force."""
    return bool(_replaced)


def enable(force: bool = False) -> None:
    """From here on, DoRA layers of PEFT models, old and new, run on our kernels. A second call does nothing.

    Args:
        force: try it with a release of PEFT that was never tested.

    Raises:
        ImportError: PEFT is not installed. RuntimeError: it is neither of 0.18, 0.19, 0.20, 0.21.
    """
    if is_enabled():
        return
    _check_version(force)
    try:
        for owner, name, value in list(_replacements()):
            _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, value)
    except BaseException:
        disable()
        raise


def disable() -> None:
    """Put PEFT's own classes and functions back. Without `enable()` before, nothing happens."""
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@contextmanager
def enabled(force: bool = False) -> Iterator[None]:
    """`enable()` for a block; afterwards everything is as it was before, be it on or off."""
    before = is_enabled()
    enable(force)
    try:
        yield
    finally:
        if not before:
            disable()


def _check_version(force: bool) -> None:
    try:
        import peft
    except ImportError as error:
        raise ImportError("dora_ext.integrations.peft: PEFT is not installed: pip install peft") from error
    version = tuple(int(part) if part.isdigit() else -1 for part in peft.__version__.split(".")[:2])
    if not force and not OLDEST <= version <= NEWEST:
        supported = " to ".join(".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise RuntimeError(
            f"dora_ext.integrations.peft: expected PEFT {supported}, found {peft.__version__}; "
            "enable(force=True) tries it nevertheless"
        )


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner (a class or module of PEFT), name, and what comes there."""
    from peft.tuners.lora import bnb, dora, layer, variants

    tuners = [layer.Linear, layer.Embedding, layer._ConvNd]
    tuners += [getattr(bnb, name) for name in ("Linear4bit", "Linear8bitLt") if hasattr(bnb, name)]
    for tuner in tuners:
        yield tuner, "forward", switched(vars(tuner)["forward"])

    for name in _DORA_CLASSES:
        ours, theirs = getattr(our_layers, name), getattr(dora, name)
        # Instances that PEFT made keep their class; its methods become ours.
        for method, function in vars(ours).items():
            if callable(function) and method not in ("__init__", "__repr__", "train"):
                yield theirs, method, function
        for module in (dora, variants):
            if hasattr(module, name):
                yield module, name, ours
    for name in ("DoraLinearVariant", "DoraEmbeddingVariant", "_DoraConvNdVariant"):
        variant = getattr(variants, name)
        yield variant, "unmerge", staticmethod(_with_zero_norms(variant.unmerge))

    # What our __init__ would have given them, made when first asked for. (PEFT 0.18 has no _dora_cache of its own.)
    for name, make in (("norm_cache", NormCache), ("_dora_cache", dict)):
        attribute = functools.cached_property(lambda self, make=make: make())
        attribute.__set_name__(dora.DoraLinearLayer, name)
        yield dora.DoraLinearLayer, name, attribute


def _with_zero_norms(theirs: Callable) -> Callable:
    """PEFT's unmerge, which divides 0 by 0 for features whose weights and magnitude are all zero."""

    @functools.wraps(theirs)
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        norm = module._caches.get(f"{active_adapter}-weight_norm")
        weight = theirs(module, active_adapter, orig_weight)
        if norm is None:
            return weight
        by_column = module.lora_magnitude_vector[active_adapter].fan_in_fan_out
        shape = (1, -1) if by_column else (-1, *([1] * (weight.dim() - 1)))
        zero = (norm <= torch.finfo(norm.dtype).tiny).view(shape)
        return weight.masked_fill(zero & weight.isnan(), 0)

    return unmerge
