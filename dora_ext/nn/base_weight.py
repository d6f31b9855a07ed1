"""Base layers' weights as the kernels want them: dense, floating point, and all here."""

import copy

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..ops.nf4 import NF4Tensor, dequantize_nf4
from ..ops.nf4_bitsandbytes import from_bitsandbytes, restored_order
from .nf4_linear import NF4Linear

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameter_of(module: nn.Module, name: str, *default: None) -> Tensor | None:
    """getattr(module, name, *default). nn.Module looks a parameter up in Python, which, in a forward and among all
    else, takes the host three times what it takes alone."""
    parameters = module._parameters
    # By index, at which ZeRO-3 gathers it. A wrapper or a parametrization has it elsewhere.
    return parameters[name] if name in parameters else getattr(module, name, *default)


def has_dense_weight(layer: nn.Module) -> bool:
    """Floating point, not packed in any way, and not shared out among processes."""
    return type(layer.weight) in (Tensor, nn.Parameter) and layer.weight.dtype in FLOAT_DTYPES


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight itself where it is dense, else a new tensor, dequantised in the dtype that it had before.
    A weight of which FSDP2 keeps a part on each rank is collected.

    Knows bitsandbytes (4 and 8 bits), torchao and HQQ by their attributes, so that none of them need be installed.
    """
    packed = packed_weight(layer)
    if packed is not None:
        return dequantize_nf4(packed)
    weight, state = _weight_and_state(layer)
    if state is None and has_dense_weight(layer):
        return weight
    if hasattr(layer, "W_q"):  # HQQ
        return layer.dequantize()
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if state is not None:
        return _dequantised_fp4(weight, state)
    if type(weight).__name__ == "Int8Params":
        import bitsandbytes

        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return weight


def dense_in(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    return dense_weight(layer).to(dtype)


def copy_with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of `layer` that shares nothing with it and has `weight`, which it takes as it is."""
    # deepcopy takes what it finds in its memo for copied already: all but the weight is copied.
    return copy.deepcopy(layer, {id(layer.weight): weight})


def packed_weight(layer: nn.Module) -> NF4Tensor | None:
    """The layer's weight as it is packed in NF4, sharing memory with it; None where it is anything else.

    Raises:
        ValueError, TypeError: bitsandbytes' quantisation state is corrupt or fits neither the weight nor the layer.
    """
    if isinstance(layer, NF4Linear):
        return layer.nf4
    weight, state = _weight_and_state(layer)
    if type(weight).__name__ != "Params4bit" and state is None:
        return None
    kind = getattr(state, "quant_type", None)
    if kind == "fp4":
        return None
    q = from_bitsandbytes(weight, state)
    if isinstance(layer, nn.Linear) and q.shape != (layer.out_features, layer.in_features):
        features = (layer.out_features, layer.in_features)
        raise ValueError(f"{type(layer).__name__}: quant_state.shape: expected {features}, got {tuple(q.shape)}")
    return q


def _weight_and_state(layer: nn.Module) -> tuple[Tensor | None, object | None]:
    weight = parameter_of(layer, "weight", None)
    if type(weight).__name__ != "Params4bit":
        weight = whole(weight)
    # FSDP replaces a Params4bit by a plain parameter; the layer still holds the state.
    return weight, getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _dequantised_fp4(weight: Tensor, state: object) -> Tensor:
    import bitsandbytes

    data, options = weight.data, {"quant_state": state}
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes' function would take the bytes to be in their usual order; from_bitsandbytes tells what they are.
        data = restored_order(data.reshape(-1).view(torch.uint8), torch.Size(state.shape))[:, None]
        options["quant_state"] = bitsandbytes.functional.QuantState(
            absmax=state.absmax.T.reshape(-1).float(), shape=state.shape, code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.original_dtype,
        )  # fmt: skip
    return bitsandbytes.functional.dequantize_4bit(data, **options)
