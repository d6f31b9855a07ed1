"""The whole-layer calls: what the forward of a PEFT layer does on the fused path.

Each takes PEFT's layer, the adapter's name and the input, and returns the layer's output, or None for an input that
PEFT's code shall have: another dtype than the base layer's (PEFT says what is wrong with it), a tensor subclass.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from ...nn.conv import convolve
from ...norm_cache import NormCache
from ...ops import dora_conv, dora_embedding, dora_linear, norm_and_gain
from ...ops._registry import autocast_dtype
from ...ops.linear import add_product
from .paths import CONV, EIGHT_BIT, EMBEDDING, FOUR_BIT, FUSED, LINEAR, TRANSPOSED, active_adapters, path_of
from .products import quantised_linear

calls = {FUSED: 0}
"""How many layer calls took the fused path in eager mode since the import; for tests and curious users."""


def switched(peft_forward: Callable) -> Callable:
    """PEFT's forward with ours in front of it: ours where the path is "fused", PEFT's everywhere else."""

    @wraps(peft_forward)
    def forward(self, x, *args, **kwargs):
        if not args and not kwargs:
            names = active_adapters(self)
            path = path_of(self, names)
            if path.path is FUSED:
                y = _CALLS[path.kind](self, names[0], x)
                if y is not None:
                    if not torch.compiler.is_compiling():
                        calls[FUSED] += 1
                    return y
        return peft_forward(self, x, *args, **kwargs)

    forward.switched = True
    return forward


def _takes(x: Tensor, weight: Tensor) -> bool:
    """What the base layer's product would take; under autocast any dtype, cast to autocast's."""
    return type(x) in (Tensor, nn.Parameter) and (x.dtype == weight.dtype or autocast_dtype(x) is not None)


def _magnitude(layer: nn.Module, adapter: str) -> tuple[nn.Module, Tensor]:
    dora = layer._modules["lora_magnitude_vector"]._modules[adapter]
    if dora._dora_cache:  # as in PEFT: a forward without DoraCaching empties it
        dora._cache_clear()
    return dora, dora._parameters["weight"]


def _factors(layer: nn.Module, adapter: str) -> tuple[Tensor, Tensor]:
    parts = layer._modules
    A, B = parts["lora_A"]._modules[adapter], parts["lora_B"]._modules[adapter]
    return A._parameters["weight"], B._parameters["weight"]


def _dropped(layer: nn.Module, adapter: str, x: Tensor) -> Tensor:
    """x itself unless dropout is at work."""
    dropout = layer._modules["lora_dropout"]._modules[adapter]
    return x if not layer.training or type(dropout) is nn.Identity else dropout(x)


def _operands(layer: nn.Module, adapter: str, x: Tensor) -> tuple[tuple[Tensor, ...], float, NormCache] | None:
    """(W, A, B, m) over a dense W, the scaling, and the norm's cache; None if x is not for us."""
    weight = layer._modules["base_layer"]._parameters["weight"]
    if not _takes(x, weight):
        return None
    dora, m = _magnitude(layer, adapter)
    return (weight, *_factors(layer, adapter), m), layer.scaling[adapter], dora.norm_cache


def _linear(layer: nn.Module, adapter: str, x: Tensor, transposed: bool = False) -> Tensor | None:
    operands = _operands(layer, adapter, x)
    if operands is None:
        return None
    tensors, scaling, cache = operands
    dropped, bias = _dropped(layer, adapter, x), layer._modules["base_layer"]._parameters["bias"]
    y = dora_linear(dropped, *tensors, bias, scaling=scaling, transposed=transposed, cache=cache)
    return y if dropped is x else add_product(y, x - dropped, tensors[0] if transposed else tensors[0].T)


def _transposed(layer: nn.Module, adapter: str, x: Tensor) -> Tensor | None:
    return _linear(layer, adapter, x, transposed=True)


def _quantised(layer: nn.Module, adapter: str, x: Tensor) -> Tensor | None:
    if type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point():
        return None
    if torch.compiler.is_compiling() and hasattr(layer._modules["base_layer"], "state"):
        return None  # bitsandbytes' 8-bit product has state that only its own forward carries through a graph
    dora, m = _magnitude(layer, adapter)
    A, B = _factors(layer, adapter)
    dropped = _dropped(layer, adapter, x)
    base = layer._modules["base_layer"]
    return quantised_linear(base, x, dropped, A, B, m, scaling=layer.scaling[adapter], cache=dora.norm_cache)


def _conv(layer: nn.Module, adapter: str, x: Tensor) -> Tensor | None:
    operands = _operands(layer, adapter, x)
    if operands is None:
        return None
    tensors, scaling, cache = operands
    norm, gain = norm_and_gain(*tensors, scaling=scaling, cache=cache)
    base, dropped = layer._modules["base_layer"], _dropped(layer, adapter, x)
    bias = base._parameters["bias"]
    y = dora_conv(
        dropped, *tensors, bias if dropped is x else None, stride=base.stride, padding=base.padding,
        dilation=base.dilation, groups=base.groups, padding_mode=base.padding_mode, scaling=scaling,
        norm=norm, gain=gain,
    )  # fmt: skip
    return y if dropped is x else y + convolve(base, x - dropped, tensors[0], bias, base.groups)


def _embedding(layer: nn.Module, adapter: str, ids: Tensor) -> Tensor | None:
    if type(ids) is not Tensor or ids.dtype not in (torch.int64, torch.int32):
        return None
    base, parts = layer._modules["base_layer"], layer._modules
    weight = base._parameters["weight"]
    A, B = parts["lora_embedding_A"]._parameters[adapter], parts["lora_embedding_B"]._parameters[adapter]
    dora, m = _magnitude(layer, adapter)
    scaling = layer.scaling[adapter]
    norm = gain = None
    if base.max_norm is None:  # which changes W, so that the norm can be taken only after it has
        norm, gain = norm_and_gain(weight, A, B, m, scaling=scaling, transposed=True, cache=dora.norm_cache)
    # A scale that lives on the device is multiplied with there: reading it would wait for the device.
    scale = getattr(base, "embed_scale", 1.0)
    on_device = isinstance(scale, Tensor)
    y = dora_embedding(
        ids, weight, A, B, m, scaling=scaling, padding_idx=base.padding_idx, max_norm=base.max_norm,
        norm_type=base.norm_type, scale_grad_by_freq=base.scale_grad_by_freq,
        embed_scale=1.0 if on_device else scale, norm=norm, gain=gain,
    )  # fmt: skip
    return y * scale.to(y.dtype) if on_device else y


_CALLS = {
    LINEAR: _linear,
    TRANSPOSED: _transposed,
    FOUR_BIT: _quantised,
    EIGHT_BIT: _quantised,
    EMBEDDING: _embedding,
    CONV: _conv,
}
