"""The ops' public functions. Each page holds one op: function, fake kernel, autograd."""

from .compose import dora_delta
from .conv import dora_conv
from .embedding import dora_embedding
from .linear import dora_linear
from .nf4 import NF4Tensor, dequantize_nf4, from_bitsandbytes, quantize_nf4
from .norm import norm_and_gain, weight_norm

__all__ = [
    "NF4Tensor",
    "dequantize_nf4",
    "dora_conv",
    "dora_delta",
    "dora_embedding",
    "dora_linear",
    "from_bitsandbytes",
    "norm_and_gain",
    "quantize_nf4",
    "weight_norm",
]
