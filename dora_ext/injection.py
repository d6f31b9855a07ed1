"""Putting DoRA layers into a model in place of its own layers, without PEFT."""

import re
from collections.abc import Iterable

from torch import nn

from .nn import DoraBase, DoraConv1d, DoraConv2d, DoraConv3d, DoraEmbedding, DoraLinear
from .nn.linear import is_transposed

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin (bitsandbytes' Linear4bit is one), and GPT-2's Conv1D, which keeps its weight (in, out)."""
    # nn.MultiheadAttention reads this one's weight past its forward, so that a wrapper would be ignored.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_transposed(module)


def dora_class(module: nn.Module) -> type[nn.Module] | None:
    """The DoRA layer that can take the place of `module`, if any."""
    if is_linear(module):
        return DoraLinear
    for base, wrapper in (
        (nn.Embedding, DoraEmbedding),
        (nn.Conv1d, DoraConv1d),
        (nn.Conv2d, DoraConv2d),
        (nn.Conv3d, DoraConv3d),
    ):
        if isinstance(module, base):
            return wrapper
    return None


def dora_layers(model: nn.Module) -> dict[str, DoraBase]:
    """Every DoRA layer in `model` by its module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DoraBase)}


def name_matches(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds ends of paths ("q_proj")."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def target_names(
    model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR, exclude: str | Iterable[str] | None = None
) -> list[str]:
    """Paths of the layers that `target_modules` names and a DoRA layer can replace; what already is one stays out."""
    patterns = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    inside_dora = tuple(f"{name}." for name in dora_layers(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = []
    for name, module in model.named_modules():
        if not name or dora_class(module) is None or f"{name}.".startswith(inside_dora):
            continue
        if exclude and name_matches(name, exclude):
            continue
        if patterns == ALL_LINEAR:
            chosen = is_linear(module) and module is not head
        else:
            chosen = name_matches(name, patterns)
        if chosen:
            names.append(name)
    return names


def place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put each layer at its path; everything in the model but DoRA parameters is frozen."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name, parameter in model.named_parameters():
        if not re.search(r"(^|\.)lora_(A|B|magnitude_vector|embedding_[AB])\.", name):
            parameter.requires_grad_(False)


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> nn.Module:
    """Wrap the layers of `model` that `target_modules` names in DoRA layers, in place, and freeze all the rest.

    Args:
        target_modules: "all-linear" (every linear layer but the output head), a list of names or ends of paths
            (["q_proj", "v_proj"]), or a regular expression for whole paths.
        r, alpha, dropout, use_rslora: as in DoraLinear.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing in the model fits; the model is as it was.
    """
    names = target_names(model, target_modules)
    if not names:
        raise ValueError(f"inject: target_modules: no layer of {type(model).__name__} fits {target_modules!r}")
    layers = {}
    for name in names:
        base = model.get_submodule(name)
        layers[name] = dora_class(base).from_base(base, r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
    place(model, layers)
    return model
