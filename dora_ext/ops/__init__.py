"""The ops' public functions. Each page holds one op: function, fake kernel, autograd."""

from .compose import dora_delta
from .conv import dora_conv
from .embedding import dora_embedding
from .linear import dora_linear
from .norm import norm_and_gain, weight_norm

__all__ = ["dora_conv", "dora_delta", "dora_embedding", "dora_linear", "norm_and_gain", "weight_norm"]
