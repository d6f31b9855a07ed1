"""Base layers' weights as the kernels want them: dense, floating point, and all here."""

import torch
from torch import Tensor, nn

from ..distributed import gathered as gathered
from ..distributed import whole as whole
from ..ops.nf4 import dequantize_nf4, from_bitsandbytes

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight itself where it is dense, else a new tensor, dequantised in the dtype that it had before.
    A weight of which FSDP2 keeps a part on each rank is collected.

    Knows bitsandbytes (4 and 8 bits), torchao and HQQ by their attributes, so that none of them need be installed.
    """
    weight = whole(getattr(layer, "weight", None))
    # FSDP replaces a Params4bit by a plain parameter; the layer still holds the state.
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOAT_DTYPES and state is None:
        return weight
    if hasattr(layer, "W_q"):  # HQQ
        return layer.dequantize()
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if type(weight).__name__ == "Params4bit" or state is not None:
        # FP4, and weights that bitsandbytes has reordered for its own CPU product, are read by bitsandbytes alone.
        if state is None or (state.quant_type == "nf4" and not getattr(state, "packing_format_for_cpu", False)):
            return dequantize_nf4(from_bitsandbytes(weight, state))
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, state)
    if type(weight).__name__ == "Int8Params":
        import bitsandbytes

        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return weight
