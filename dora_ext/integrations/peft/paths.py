"""Which path a PEFT layer takes, and why: one function, asked by every forward and by `report`.

- fused: base product, adapter and magnitude are one call of ours.
- delta: PEFT's layer does the base product and adds, for each DoRA adapter, what our layer class gives.
- peft: PEFT's own code, because nothing of DoRA is to be computed, or because it has not been switched over.

The function is called in every forward, so it only looks attributes up, past nn.Module.__getattr__ where that is slow.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks

from ...nn.base_weight import FLOAT_DTYPES
from ...nn.factors import hooked
from ...nn.layers import caching_enabled

FUSED, DELTA, PEFT = "fused", "delta", "peft"

# What kind of layer the base is; each has its call in forwards.py.
LINEAR, TRANSPOSED, FOUR_BIT, EIGHT_BIT, EMBEDDING, CONV = _KINDS = range(6)


class Path(NamedTuple):
    """The path of one layer: "fused", "delta" or "peft"; why; where it is "fused", the kind of its base layer."""

    path: str
    reason: str
    kind: int = -1


# One object for each answer, made once.
_DISABLED = Path(PEFT, "adapters are disabled")
_MERGED = Path(PEFT, "an adapter is merged into the base weight")
_NO_ADAPTER = Path(PEFT, "no active adapter on this layer")
_OTHER_VARIANT = Path(PEFT, "the active adapter is not DoRA")
_SEVERAL = Path(DELTA, "several active adapters")
_BASE_KIND = Path(DELTA, "a base layer of a class with its own forward")
_BASE_HOOKS = Path(DELTA, "the base layer has hooks or a forward of its own")
_GLOBAL_HOOKS = Path(DELTA, "hooks on all modules are registered")
_BASE_WEIGHT = Path(DELTA, "the base weight or bias is not a plain floating-point tensor")
_BASE_GRAD = Path(DELTA, "the base weight is trained too")
_BASE_STATE = Path(DELTA, "the quantised base weight is not in the state that our call reads")
_LAYOUT = Path(DELTA, "fan_in_fan_out does not say how the base layer keeps its weight")
_LORA_BIAS = Path(DELTA, "lora_bias: B has a bias")
_FACTORS = Path(DELTA, "A or B is wrapped, hooked, or not a plain floating-point tensor")
_MAGNITUDE = Path(DELTA, "the magnitude is wrapped, hooked, or not a plain floating-point tensor")
_DEVICES = Path(DELTA, "base weight, adapter and magnitude are on several devices")
_SCALING = Path(DELTA, "the scaling is a tensor")
_DROPOUT = Path(DELTA, "a dropout that is not torch.nn.Dropout")
_EIGHT_BIT_DROPOUT = Path(DELTA, "dropout over an 8-bit base layer: its two inputs need two products")
_CACHING = Path(DELTA, "PEFT's DoraCaching is on")
_EMBEDDING = Path(DELTA, "sparse gradients, a parallel plan, or an embed_scale that is not one number")
_FUSED = tuple(Path(FUSED, "base product, adapter and magnitude are one call", kind) for kind in _KINDS)

_VARIANTS = frozenset(f"Dora{kind}Variant" for kind in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"))
_DROPOUTS = (nn.Identity, nn.Dropout)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_kinds: dict[type, int | None] = {}


def _find_kind(cls: type) -> int | None:
    """None: a class that computes something that we don't know. Other libraries' classes are named, not imported."""
    if cls in _CONVS:
        return CONV
    if cls.__module__.startswith("transformers."):
        if cls.__name__ == "Conv1D":
            return TRANSPOSED
        if cls.__name__.endswith("ScaledWordEmbedding") and issubclass(cls, nn.Embedding):
            return EMBEDDING
    # Linear4bit has the subclasses LinearNF4 and LinearFP4.
    if any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes.") for c in cls.__mro__[:2]):
        return FOUR_BIT
    if cls.__name__ == "Linear8bitLt" and cls.__module__.startswith("bitsandbytes."):
        return EIGHT_BIT
    for known, kind in ((nn.Linear, LINEAR), (nn.Embedding, EMBEDDING)):
        # Subclasses that change how a layer is made, or its name, but not what it computes.
        if issubclass(cls, known) and cls.forward is known.forward and cls.__call__ is nn.Module.__call__:
            return kind
    return None


def _kind_of(cls: type) -> int | None:
    if torch.compiler.is_compiling():  # whose graph must not depend on what else is in the dictionary
        return _find_kind(cls)
    if cls not in _kinds:
        _kinds[cls] = _find_kind(cls)
    return _kinds[cls]


def active_adapters(layer: nn.Module) -> list[str]:
    """The active adapters that `layer` has."""
    active, scalings = layer._active_adapter, layer.scaling
    if isinstance(active, str):
        return [active] if active in scalings else []
    return [name for name in active if name in scalings]


def _plain(t) -> bool:
    return type(t) in (nn.Parameter, Tensor) and t.dtype in FLOAT_DTYPES


def _grad_and_device(t: Tensor) -> tuple[bool, torch.device]:
    """Past a Params4bit's own __torch_function__, through which every look at it goes."""
    if torch.compiler.is_compiling():
        return t.requires_grad, t.device
    with torch._C.DisableTorchFunctionSubclass():
        return t.requires_grad, t.device


def path_of(layer: nn.Module, names: list[str]) -> Path:
    """The path that PEFT's `layer` (Linear, Linear4bit, Linear8bitLt, Embedding, Conv1d, Conv2d, Conv3d) takes with
    nothing but its input as argument, `names` being its active adapters. Further arguments, mixed-batch `adapter_names`
    among them, go to PEFT's code, as does an input of another dtype than the base layer takes."""
    if layer._disable_adapters:
        return _DISABLED
    if layer.merged_adapters:
        return _MERGED
    variants = layer.lora_variant
    if not names:
        return _NO_ADAPTER
    if len(names) > 1:
        return _SEVERAL if any(type(variants.get(name)).__name__ in _VARIANTS for name in names) else _OTHER_VARIANT
    name = names[0]
    if type(variants.get(name)).__name__ not in _VARIANTS:
        return _OTHER_VARIANT

    modules = layer._modules
    base = modules["base_layer"]
    kind = _kind_of(type(base))
    if kind is None:
        return _BASE_KIND
    if hooked(base) or "forward" in base.__dict__:
        return _BASE_HOOKS
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return _GLOBAL_HOOKS
    weight = base._parameters.get("weight")
    if weight is None or (kind != EMBEDDING and "bias" not in base._parameters):
        return _BASE_WEIGHT
    if kind in (FOUR_BIT, EIGHT_BIT):
        if not _quantised_readable(base, weight, kind):
            return _BASE_STATE
        trained, device = _grad_and_device(weight)
    elif not _plain(weight) or hasattr(weight, "quant_state") or hasattr(weight, "ds_id"):
        return _BASE_WEIGHT
    else:
        trained, device = weight.requires_grad, weight.device
    if trained:
        return _BASE_GRAD

    if kind == EMBEDDING:
        A, B = modules["lora_embedding_A"]._parameters.get(name), modules["lora_embedding_B"]._parameters.get(name)
        scale = getattr(base, "embed_scale", 1.0)
        one = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
        if base.sparse or getattr(layer, "tp_layer", None) is not None or not one:
            return _EMBEDDING
    else:
        if kind != CONV and layer.fan_in_fan_out != (kind == TRANSPOSED):
            return _LAYOUT
        part_A, part_B = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
        types = _CONVS if kind == CONV else (nn.Linear,)
        if type(part_A) not in types or type(part_B) not in types or hooked(part_A) or hooked(part_B):
            return _FACTORS
        if part_A._parameters["bias"] is not None or part_B._parameters["bias"] is not None:
            return _LORA_BIAS
        A, B = part_A._parameters.get("weight"), part_B._parameters.get("weight")
        dropout = type(modules["lora_dropout"]._modules[name])
        if dropout not in _DROPOUTS:
            return _DROPOUT
        if kind == EIGHT_BIT and layer.training and dropout is not nn.Identity:
            return _EIGHT_BIT_DROPOUT
    if not _plain(A) or not _plain(B):
        return _FACTORS
    dora = modules["lora_magnitude_vector"]._modules[name]
    magnitude = dora._parameters.get("weight")
    if not _plain(magnitude) or hooked(dora):
        return _MAGNITUDE
    if A.device != device or B.device != device or magnitude.device != device:
        return _DEVICES
    if not isinstance(layer.scaling[name], (int, float)):
        return _SCALING
    if not layer.training and caching_enabled():
        return _CACHING
    return _FUSED[kind]


def _quantised_readable(base: nn.Module, weight: Tensor, kind: int) -> bool:
    if kind == FOUR_BIT:
        # FSDP2 puts a plain parameter in the place of a Params4bit; the layer still holds the state.
        if type(weight) is nn.Parameter:
            return getattr(base, "quant_state", None) is not None
        return type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None
    return type(weight).__name__ == "Int8Params" and not base.state.has_fp16_weights and weight.dtype == torch.int8
