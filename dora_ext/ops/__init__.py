"""The ops' public functions. Each page holds one op: function, fake kernel, autograd."""

from . import decode, product  # noqa: F401  their fake kernels
from .compose import dora_delta
from .conv import dora_conv
from .embedding import dora_embedding
from .linear import dora_linear
from .linear_nf4 import dora_linear_nf4
from .nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from .nf4_bitsandbytes import from_bitsandbytes
from .norm import norm_and_gain, weight_norm
from .norm_nf4 import norm_and_gain_nf4, weight_norm_nf4

__all__ = [
    "NF4Tensor",
    "dequantize_nf4",
    "dora_conv",
    "dora_delta",
    "dora_embedding",
    "dora_linear",
    "dora_linear_nf4",
    "from_bitsandbytes",
    "norm_and_gain",
    "norm_and_gain_nf4",
    "quantize_nf4",
    "weight_norm",
    "weight_norm_nf4",
]
