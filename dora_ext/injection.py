"""Putting DoRA layers into a model in place of its own layers, and taking them out again, without PEFT."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .config import ALL_LINEAR, DoraConfig
from .distributed import gathered
from .nn import DoraBase, DoraConv1d, DoraConv2d, DoraConv3d, DoraEmbedding, DoraLinear
from .nn.folded import FoldedLayer
from .nn.linear import is_transposed

# Names of the parameters that `place` has frozen, kept with the model so that `unload` can give them back.
FROZEN = "_dora_ext_frozen"


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's or DeepSpeed's wrapper: their names are not part of
    its paths."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"
    return unwrapped(model.module) if wrapped else model


def dora_layers(model: nn.Module) -> dict[str, DoraBase]:
    """Every DoRA layer in `model` by its module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DoraBase)}


def folded_layers(model: nn.Module) -> dict[str, FoldedLayer]:
    """Every layer in `model` that has an adapter folded in beside its base layer, by its module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FoldedLayer)}


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all but the model itself, DoRA layers and what is in them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, (DoraBase, FoldedLayer)):
            inside += (f"{name}.",)
        elif name and not name.startswith(inside):
            yield name, module


def target_names(model: nn.Module, config: DoraConfig | None = None) -> list[str]:
    """Paths of the layers that `config` (default: "all-linear") chooses; what already is a DoRA layer stays out.

    Raises:
        ValueError: target_modules fits a module that no DoRA layer can replace.
    """
    config = config or DoraConfig()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = []
    for name, module in modules_outside_adapters(model):
        if config.excludes(name):
            continue
        if config.targets_all_linear:
            if is_linear(module) and module is not head:
                names.append(name)
        elif config.targets(name):
            if dora_class(module) is None:
                raise ValueError(
                    f"target_modules: {name} is a {type(module).__name__}, and DoRA layers exist for linear layers, "
                    "embeddings and convolutions"
                )
            names.append(name)
    return names


def new_layers(model: nn.Module, config: DoraConfig, names: list[str]) -> dict[str, DoraBase]:
    """DoRA layers for `names` as `config` asks for them, around the model's layers but not in their places yet.

    Freezes the layers: use it inside `flags_kept_on_error`. Raises what from_base raises.
    """
    layers = {}
    for name in names:
        base = model.get_submodule(name)
        r, alpha = config.rank_and_alpha(name)
        options = {"r": r, "alpha": alpha, "dropout": config.dropout, "use_rslora": config.use_rslora}
        try:
            layers[name] = dora_class(base).from_base(base, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        _initialise(layers[name], config.init_lora_weights)
    return layers


def warn_of_shared_weights(model: nn.Module, names: list[str]) -> None:
    """A language model's head often is its embedding: an adapter on one of them changes that one alone."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None) if name and dora_class(module) else None
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    for paths in owners.values():
        chosen = [path for path in paths if path in names]
        if chosen and len(paths) > 1:
            warnings.warn(
                f"{' and '.join(paths)} share one weight: each adapter (on {' and '.join(chosen)}) changes its own "
                "layer alone, and unload(model, merge=True) leaves them with different weights",
                stacklevel=3,
            )


@torch.no_grad()
def _initialise(layer: DoraBase, init_lora_weights: bool | str) -> None:
    """As PEFT's reset_lora_parameters does it; `layer` is as from_base left it."""
    if init_lora_weights is True:
        return
    embedding = isinstance(layer, DoraEmbedding)
    with gathered(layer, write=True):
        lora_A, lora_B = layer._factors()
        if init_lora_weights is False:
            for factor in (lora_A, lora_B):
                if embedding:
                    nn.init.normal_(factor)
                else:
                    nn.init.kaiming_uniform_(factor, a=5**0.5)
        elif not embedding:
            nn.init.normal_(lora_A, std=1 / layer.r)
        if not layer.magnitude.is_meta:
            layer.magnitude.copy_(layer.weight_norm().view_as(layer.magnitude))


@contextmanager
def flags_kept_on_error(model: nn.Module) -> Iterator[dict[str, bool]]:
    """What freezes parameters and then fails leaves them as trainable as they were. Gives these flags by name."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    try:
        yield flags
    except BaseException:
        for name, flag in flags.items():
            parameters[name].requires_grad_(flag)
        raise


def place(model: nn.Module, layers: dict[str, nn.Module], flags: dict[str, bool]) -> None:
    """Put each layer at its path; everything in the model but DoRA parameters is frozen.

    `flags` says by name which parameters were trainable before.
    """
    replace(model, layers)
    ours = re.compile(r"(^|\.)lora_(A|B|magnitude_vector|embedding_[AB])\.")
    for name, parameter in model.named_parameters():
        if not ours.search(name):
            parameter.requires_grad_(False)
    trained = {name for name, flag in flags.items() if flag and not ours.search(name)}
    setattr(model, FROZEN, getattr(model, FROZEN, set()) | trained)


def replace(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def inject(model: nn.Module, target_modules: DoraConfig | str | Iterable[str] = ALL_LINEAR, **options) -> nn.Module:
    """Wrap layers of `model` in DoRA layers, in place, and freeze all the rest.

    inject(model, DoraConfig(...)), or for short inject(model, target_modules, r=8, alpha=16, ...).

    Args:
        target_modules: a DoraConfig, or its target_modules: "all-linear", a list of names or ends of paths
            (["q_proj", "v_proj"]), a regular expression for whole paths.
        options: other fields of DoraConfig, where none is given.

    Returns:
        `model` itself.

    Warns of fields that fit nothing, as PEFT does, and of a layer whose weight another one shares (an embedding and a
    language model's head): its adapter changes that layer alone.

    Raises:
        TypeError, ValueError: a field is wrong, or nothing in the model fits; the model is as it was.
    """
    if isinstance(target_modules, DoraConfig):
        if options:
            raise TypeError(f"inject: {', '.join(options)}: given beside a DoraConfig; put them into it")
        config = target_modules
    else:
        if isinstance(target_modules, Iterable) and not isinstance(target_modules, str):
            target_modules = tuple(target_modules)
        config = DoraConfig(target_modules=target_modules, **options)
    inner = unwrapped(model)
    names = target_names(inner, config)
    if not names:
        limits = {n: getattr(config, n) for n in ("exclude_modules", "layers_to_transform", "layers_pattern")}
        said = "".join(f", {n}={value!r}" for n, value in limits.items() if value is not None)
        raise ValueError(
            f"inject: target_modules: no layer of {type(inner).__name__} fits {config.target_modules!r}{said}"
        )
    warn_of_shared_weights(inner, names)
    if config.exclude_modules and not any(config.excludes(name) for name, _ in modules_outside_adapters(inner)):
        warnings.warn(f"exclude_modules: {config.exclude_modules!r} fits nothing in the model", stacklevel=2)
    for option, keys in config.unused_patterns(names).items():
        warnings.warn(f"{option}: {keys!r} fit none of the chosen layers", RuntimeWarning, stacklevel=2)
    with flags_kept_on_error(inner) as flags:
        layers = new_layers(inner, config, names)
    place(inner, layers, flags)
    return model
