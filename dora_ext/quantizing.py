"""Packing a model's linear layers into 4 bits, in place, without bitsandbytes."""

from collections.abc import Iterable

from torch import nn

from .config import ALL_LINEAR, DoraConfig
from .distributed import gathered, is_sharded
from .injection import is_linear, replace, target_names, unwrapped
from .nn import NF4Linear
from .nn.base_weight import has_dense_weight
from .nn.linear import is_transposed


def quantize_layers(
    model: nn.Module,
    target_modules: DoraConfig | str | Iterable[str] = ALL_LINEAR,
    *,
    double_quant: bool = True,
    blocksize: int = 64,
) -> nn.Module:
    """Pack linear layers of `model` in NF4, in place: an NF4Linear takes the place of each, with its bias.

    `inject` or `load_adapter` come after (QDoRA for a whole model). Layers are packed one after the other, and a dense
    weight is freed before the next is packed, unless something else holds it, as an embedding may that shares it.

    Args:
        target_modules: as in `inject`; chosen layers that are packed already, in whatever way, stay as they are.
        double_quant: also keep the scales in 8 bits.
        blocksize: weights per scale, a power of two from 32 to 4096.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing in the model fits, a chosen module is no linear layer or shared out by FSDP2 (pack before
            fully_shard), or blocksize; the model is as it was.
    """
    if not isinstance(target_modules, DoraConfig):
        if isinstance(target_modules, Iterable) and not isinstance(target_modules, str):
            target_modules = tuple(target_modules)
        target_modules = DoraConfig(target_modules=target_modules)
    inner = unwrapped(model)
    names = target_names(inner, target_modules)
    if not names:
        fits = f"no layer of {type(inner).__name__} fits {target_modules.target_modules!r}"
        raise ValueError(f"quantize_layers: target_modules: {fits}")
    for name in names:
        _check(name, inner.get_submodule(name))
    for name in names:
        if has_dense_weight(inner.get_submodule(name)):
            replace(inner, {name: _packed(inner.get_submodule(name), double_quant, blocksize)})
    return model


def _check(name: str, layer: nn.Module) -> None:
    if not is_linear(layer):
        got = type(layer).__name__
        raise ValueError(f"quantize_layers: target_modules: {name}: expected a linear layer, got {got}")
    if any(map(is_sharded, layer.parameters())):
        raise ValueError(f"quantize_layers: model: FSDP2 has sharded {name} already; pack it before fully_shard")


def _packed(layer: nn.Module, double_quant: bool, blocksize: int) -> NF4Linear:
    with gathered(layer):
        packed = NF4Linear.from_linear(layer, double_quant, blocksize, is_transposed(layer))
    return packed.train(layer.training)
