"""Adapters in the format of kohya's sd-scripts, LyCORIS, OneTrainer and ComfyUI: one safetensors file, to be read only.

A layer's keys are a prefix ("lora_unet_"), its path with underscores in place of dots (or as it is), and

    .lora_down.weight   A (r, in, *kernel)
    .lora_up.weight     B (out, r, 1, ...)
    .alpha              s = alpha / r; 1 without it
    .dora_scale         m, (out, 1, ...): one for each output, as in the paper; LyCORIS calls that wd_on_out=True
                        or (1, in, ...): one for each input (channel): wd_on_out=False

In the second case W' = (W + s B A) * m / |W + s B A| with the norm of each column, over all outputs. That is another
decomposition than DoRA's, which the layers here cannot train: it is folded into the weight, for inference only.
"""

import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .distributed import copy_whole, gathered
from .files import AdapterError, read_safetensors, refuse
from .injection import dora_class, dora_layers, flags_kept_on_error, folded_layers, place, unwrapped
from .nn import DoraBase
from .nn.base_weight import copy_with_weight, dense_weight
from .nn.folded import FoldedLayer
from .ops._registry import accumulate_dtype, without_autocast

_DOWN, _UP, _ALPHA, _SCALE = _PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
_OTHER_KINDS = {
    r"lora_mid\.": "a Tucker decomposition (lora_mid)",
    r"hada_": "LoHa",
    r"lokr_": "LoKr",
    r"oft_": "OFT",
    r"[ab][12]\.": "GLoRA",
    r"on_input$": "IA3",
    r"diff(_b)?$": "a full difference of weights",
    r"[wb]_norm$": "a trained norm layer",
    r"lora_(A|B)\.": "under PEFT's names, for which there is load_adapter",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Entry:
    """What the file has for one layer: its tensors by the ends of their keys, then A, B, m in the layer's shapes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    factors: tuple[Tensor, Tensor, Tensor] = ()
    alpha: float = 0.0
    by_input: bool = False

    @property
    def r(self) -> int:
        down = self.tensors[_DOWN]
        return down.shape[0] if down.dim() else 0


def load_kohya(
    model: nn.Module, file: str | os.PathLike, *, prefix: str = "lora_unet_", other_prefixes: Iterable[str] = ()
) -> nn.Module:
    """Load a DoRA adapter in kohya's format into `model`. All of it or nothing, as with `load_adapter`.

    Linear layers and convolutions with one magnitude for each output become DoRA layers, ready to be trained further;
    norms are those of W + s B A, as LyCORIS trains them (ComfyUI, when it applies a file, divides by those of W).
    Layers with one magnitude for each input become FoldedLayers, with a warning: exact, frozen, their base layers
    kept beside for `unload`, and save_adapter refuses them.

    Args:
        prefix: of the keys that are for `model`; what follows it is the path of a layer in this very model: names are
            not translated from one library's model to another's.
        other_prefixes: of keys that are for other models and left out ("lora_te1_", "lora_te2_").

    Returns:
        `model` itself.

    Raises:
        FileNotFoundError: no such file. AdapterError: one that is not safetensors, holds other kinds of adapters
            (LoHa, LoKr, Tucker, LoRA without dora_scale, ...), or does not fit `model`.
    """
    path, inner = Path(file), unwrapped(model)
    tensors = read_safetensors("load_kohya", path)
    entries, problems = _sort(tensors, prefix, tuple(other_prefixes))
    found, unplaced = _find(inner, entries, prefix)
    problems += unplaced
    for name, entry in found.items():
        problems += _fit(name, inner.get_submodule(name), entry)
    problems += [
        f"missing keys: the model's DoRA layer {name} has none" for name in dora_layers(inner) if name not in found
    ]
    if not found and not problems:
        problems.append(f"no key starts with prefix={prefix!r}")
    refuse("load_kohya", problems)

    present = dora_layers(inner)
    with flags_kept_on_error(inner) as flags, torch.no_grad():
        new = {}
        for name, entry in found.items():
            base = inner.get_submodule(name)
            if entry.by_input:
                new[name] = _fold(base, entry)
            elif name not in present:
                try:
                    new[name] = dora_class(base).from_base(base, r=entry.r, alpha=entry.alpha)
                except (TypeError, ValueError) as error:
                    raise AdapterError(f"load_kohya: {name}: {error}") from error
    for name, layer in (present | new).items():
        if isinstance(layer, DoraBase):
            for parameter, value in zip((*layer._factors(), layer.magnitude), found[name].factors, strict=True):
                with torch.no_grad(), gathered([parameter], write=True):
                    copy_whole(parameter, value)
    place(inner, new, flags)
    folded = sorted(name for name, entry in found.items() if entry.by_input)
    if folded:
        warnings.warn(
            f"{path}: {len(folded)} layers ({', '.join(folded)}) have a magnitude for each input: they are folded into "
            "their weights, for inference only",
            stacklevel=2,
        )
    return model


def _sort(
    tensors: dict[str, Tensor], prefix: str, other_prefixes: tuple[str, ...]
) -> tuple[dict[str, _Entry], list[str]]:
    """The file's tensors by what follows the prefix, and what is wrong with their keys."""
    entries, problems = {}, []
    for key, value in tensors.items():
        if key.startswith(other_prefixes):
            continue
        stem, part = next(((key.removesuffix(f".{p}"), p) for p in _PARTS if key.endswith(f".{p}")), (key, None))
        kind = next((kind for end, kind in _OTHER_KINDS.items() if re.search(rf"\.{end}", key)), None)
        if part is None:
            problems.append(f"{key} is {kind}: not supported" if kind else f"unknown key {key}")
        elif not key.startswith(prefix):
            problems.append(f"unknown key {key}: expected prefix={prefix!r}, or one of other_prefixes")
        else:
            if not value.is_floating_point():
                problems.append(f"{key}: expected floating point numbers, got {value.dtype}")
            entries.setdefault(stem.removeprefix(prefix), _Entry()).tensors[part] = value
    return entries, problems


def _find(model: nn.Module, entries: dict[str, _Entry], prefix: str) -> tuple[dict[str, _Entry], list[str]]:
    """The entries by the paths of their layers, and those that have none."""
    inside = tuple(f"{name}." for name in dora_layers(model) | folded_layers(model))
    paths: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        if name and not name.startswith(inside):
            for stem in (name, name.replace(".", "_")):
                paths.setdefault(stem, set()).add(name)
    found, problems = {}, []
    for stem, entry in entries.items():
        names = sorted(paths.get(stem, ()))
        if len(names) == 1:
            found[names[0]] = entry
        elif names:
            problems.append(f"{prefix}{stem} may be {' or '.join(names)}")
        else:
            problems += [f"unknown key {prefix}{stem}.{part}: the model has no such layer" for part in entry.tensors]
    return found, problems


def _fit(name: str, module: nn.Module, entry: _Entry) -> list[str]:
    """Fills in the entry's factors and alpha; what is wrong with them."""
    base = module.base_layer if isinstance(module, DoraBase) else module
    tensors = entry.tensors
    if isinstance(module, FoldedLayer):
        return [f"{name} has an adapter already: call unload() first"]
    if dora_class(base) is None or not isinstance(base, (nn.Linear, *_CONVOLUTIONS)):
        return [f"{name}: expected a linear layer or a convolution, got {type(base).__name__}"]
    missing = [part for part in (_DOWN, _UP) if part not in tensors]
    if missing:
        return [f"missing key {name}: {part}" for part in missing]
    if _SCALE not in tensors:
        return [f"{name} has no dora_scale: plain LoRA is not DoRA"]
    if getattr(base, "groups", 1) != 1:
        return [f"{name}: a convolution with groups={base.groups} is not supported in this format"]

    if isinstance(base, nn.Linear):
        out, inputs, kernel = base.out_features, base.in_features, ()
    else:
        out, inputs, kernel = base.out_channels, base.in_channels, base.kernel_size
    ones = tuple(1 for _ in kernel)
    r = entry.r
    lora_A = _in_shape(tensors[_DOWN], (r, inputs, *kernel))
    lora_B = _in_shape(tensors[_UP], (out, r, *ones))
    by_output, by_input = (_in_shape(tensors[_SCALE], shape) for shape in ((out, 1, *ones), (1, inputs, *ones)))
    problems = []
    if lora_A is None or r == 0:
        problems.append(_wrong_shape(name, _DOWN, tensors, (r, inputs, *kernel)))
    if lora_B is None:
        problems.append(_wrong_shape(name, _UP, tensors, (out, r, *ones)))
    if by_output is None and by_input is None:
        problems.append(_wrong_shape(name, _SCALE, tensors, (out, 1, *ones)) + f" or {(1, inputs, *ones)}")
    entry.by_input = by_output is None
    entry.alpha = tensors[_ALPHA].item() if _ALPHA in tensors and tensors[_ALPHA].numel() == 1 else float(r)
    if _ALPHA in tensors and (tensors[_ALPHA].numel() != 1 or not 0 < entry.alpha < math.inf):
        problems.append(f"{name}: alpha: expected one positive number, got {tensors[_ALPHA].tolist()}")
    if problems:
        return problems
    if entry.by_input and isinstance(module, DoraBase):
        return [f"{name} is a DoRA layer, which has no place for a magnitude for each input: load into a plain model"]
    if entry.by_input and dense_weight(base) is not base.weight:
        return [f"{name}: a magnitude for each input needs a dense weight, and {type(base).__name__} is quantised"]
    if isinstance(module, DoraBase):
        problems = _fit_present(name, module, entry)
    magnitude = by_input if entry.by_input else by_output.flatten() if not kernel else by_output.reshape(1, out, *ones)
    entry.factors = (lora_A, lora_B, magnitude)
    return problems


def _fit_present(name: str, layer: DoraBase, entry: _Entry) -> list[str]:
    problems = []
    if layer.merged:
        problems.append(f"{name} is merged: call unmerge() first")
    if layer.r != entry.r:
        problems.append(f"{name}: rank {entry.r} in the file, {layer.r} in the model")
    elif not math.isclose(entry.alpha / entry.r, layer.scaling, rel_tol=1e-6):
        problems.append(f"{name}: scaling {entry.alpha / entry.r:g} in the file, {layer.scaling:g} in the model")
    return problems


def _in_shape(t: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A 1x1 convolution may be written as a matrix and the other way round, and any kernel flat."""
    flat = t.dim() == 2 or (t.dim() > 2 and t.shape[2:].numel() == 1)
    if tuple(t.shape) == shape or (flat and t.flatten(1).shape == (shape[0], math.prod(shape[1:]))):
        return t.reshape(shape)
    return None


def _wrong_shape(name: str, part: str, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> str:
    return f"{name}: {part}: got shape {tuple(tensors[part].shape)}, expected {shape}"


def _fold(base: nn.Module, entry: _Entry) -> FoldedLayer:
    """(W + s B A) * m / n, n the norm for each input (channel) over outputs and kernel; 0 where n is."""
    weight, dtype = base.weight, accumulate_dtype(base.weight.dtype)
    with without_autocast(weight.device):
        lora_A, lora_B, magnitude = (t.to(weight.device, dtype) for t in entry.factors)
        delta = (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(weight)
        effective = weight.to(dtype) + entry.alpha / entry.r * delta
        norm = effective.transpose(0, 1).flatten(1).norm(dim=1).view_as(magnitude)
        folded = nn.Parameter((effective * (magnitude / norm.masked_fill(norm == 0, math.inf))).to(weight.dtype))
    return FoldedLayer(base.requires_grad_(False), copy_with_weight(base, folded))
