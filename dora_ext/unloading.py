"""A model with adapters: what is trained, merging them for inference, taking them out again."""

from torch import nn

from .injection import FROZEN, dora_layers, folded_layers, replace, unwrapped
from .nn import DoraBase
from .nn.folded import FoldedLayer


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is to be given: each parameter of `model` that requires a gradient, once."""
    return [p for p in model.parameters() if p.requires_grad]


def merge(model: nn.Module) -> nn.Module:
    """Merge every DoRA layer of `model`: its forward costs what the model's did without adapters.

    `unmerge(model)` brings back the very same bits; layers that are merged already stay so. Returns `model`.

    Raises:
        ValueError: there is no DoRA layer.
    """
    merged = []
    try:
        for layer in _present("merge", model).values():
            if isinstance(layer, DoraBase) and not layer.merged:
                layer.merge()
                merged.append(layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take `merge` back in every layer that is merged. Returns `model`. ValueError: there is no DoRA layer."""
    for layer in _present("unmerge", model).values():
        if isinstance(layer, DoraBase) and layer.merged:
            layer.unmerge()
    return model


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Take the DoRA layers out of `model`, and make trainable again what `inject` has frozen.

    Args:
        merge: False: the layers that were there before come back, the same objects with the same bits. True: plain
            layers of their types come in their places, with the adapter folded into the weight (what PEFT calls
            merge_and_unload); one by one, so that never more than one weight is there twice.

    Returns:
        `model` itself.

    Raises:
        ValueError: there is no DoRA layer, or with merge=False one that is merged, whose adapter would be lost.
    """
    inner = unwrapped(model)
    layers = _present("unload", inner)
    if "" in layers:
        raise ValueError("unload: model is itself a DoRA layer: take its base_layer, or to_base()")
    lost = [name for name, layer in layers.items() if isinstance(layer, DoraBase) and layer.merged and not merge]
    if lost:
        raise ValueError(
            f"unload: {lost[0]} is merged: say merge=True to keep the adapter, or call unmerge(model) first"
        )
    for name, layer in layers.items():
        if not merge:
            plain = layer.base_layer
        elif isinstance(layer, FoldedLayer):
            plain = layer.folded
        else:
            if layer.merged:
                layer.unmerge()
            plain = layer.to_base()
        replace(inner, {name: plain})
    for name, parameter in inner.named_parameters():
        if name in getattr(inner, FROZEN, ()):
            parameter.requires_grad_(True)
    vars(inner).pop(FROZEN, None)
    return model


def _present(function: str, model: nn.Module) -> dict[str, DoraBase | FoldedLayer]:
    inner = unwrapped(model)
    layers = dora_layers(inner) | folded_layers(inner)
    if not layers:
        raise ValueError(f"{function}: model: {type(inner).__name__} has no DoRA layer")
    return layers
