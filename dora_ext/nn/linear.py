"""DoraLinear: a frozen linear layer and its DoRA adapter in one module."""

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..distributed import gathered, whole
from ..ops import dora_linear, norm_and_gain, norm_and_gain_nf4
from ..ops._registry import autocast_dtype, in_dtype, without_autocast
from ..ops.linear import add_product
from ..ops.linear_nf4 import linear_packed, linear_unpacked
from .base import ADAPTER, DoraBase, parameter_of
from .base_weight import dense_in, dense_weight, has_dense_weight, packed_weight
from .nf4_linear import NF4Linear, requantised_like


class TransposedLinear(nn.Module):
    """y = x W + bias with W (in, out), the layout of GPT-2's Conv1D; DoraLinear's base with `fan_in_fan_out`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def is_transposed(layer: nn.Module) -> bool:
    """A layer that keeps its weight (in, out). transformers' Conv1D is named, not imported: it need not be there."""
    return isinstance(layer, TransposedLinear) or any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(layer).__mro__
    )


class DoraLinear(DoraBase):
    """y = g * (x W^T + s (x A^T) B^T) + bias, with g = m / |W + s B A| (arXiv 2402.09353, equation 5).

    Shapes: x (..., in_features), W (out, in), or (in, out) with `fan_in_fan_out`, A (r, in), B (out, r), m (out,).

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear has them; W and bias are frozen.
        r, alpha, use_rslora: rank; s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
        dropout: chance that training drops an element of the adapter's input x_d, as in PEFT:
            y = x W^T + bias + (g - 1) * x_d W^T + g * s x_d A^T B^T.
        fan_in_fan_out: W is (in, out), as GPT-2's Conv1D keeps it.
        adapter_dtype: of A, B, m; by default float32 where W is bfloat16 or float16, else W's dtype.

    `from_base` wraps torch.nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt, and NF4Linear. x
    must have W's dtype (any dtype if W is quantised), or autocast's.

    Over a 4-bit base the norm comes from the packed bytes, W is dequantised once in forward and once in backward, and
    between them nothing of its size is kept. Products are made in the base layer's compute_dtype if it has one, as
    bitsandbytes' Linear4bit does, else in autocast's or x's dtype; the answer has x's. `merge` keeps a dense folded
    weight beside the packed one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = (TransposedLinear if fan_in_fan_out else nn.Linear)(in_features, out_features, bias, device, dtype)
        self._wrap(base, r, alpha, dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_base(
        cls,
        layer: nn.Module,
        *args: Any,
        quantize: str | None = None,
        double_quant: bool = True,
        blocksize: int = 64,
        **options: Any,
    ) -> "DoraLinear":
        """As DoraBase.from_base; with `quantize` around a packed copy of `layer`, which itself stays as it is.

        Args:
            quantize: "nf4": W is kept in 4 bits (NF4Linear), bit for bit as bitsandbytes packs it. A Conv1D's is turned
                to (out, in) first.
            double_quant: also keep the scales in 8 bits.
            blocksize: weights per scale, a power of two from 32 to 4096.

        Raises:
            ValueError: another `quantize`, a block size out of range, or `layer` is quantised already.
        """
        if quantize is not None:
            if quantize != "nf4":
                raise ValueError(f'DoraLinear: quantize: expected "nf4" or None, got {quantize!r}')
            cls._check_base(layer)
            if not has_dense_weight(layer):
                got = f"{type(layer).__name__} with {type(layer.weight).__name__} of {layer.weight.dtype}"
                raise ValueError(f"DoraLinear: quantize: expected a layer with a dense weight, got {got}")
            with gathered(layer):
                layer = NF4Linear.from_linear(layer, double_quant, blocksize, is_transposed(layer))
        return super().from_base(layer, *args, **options)

    @staticmethod
    def _check_base(layer: nn.Module) -> None:
        if not (isinstance(layer, nn.Linear) or is_transposed(layer)):
            raise TypeError(
                "DoraLinear: layer: expected torch.nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit, "
                f"got {type(layer).__name__}"
            )

    def _add_factors(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.transposed = self.fan_in_fan_out = is_transposed(self.base_layer)
        self.out_features, self.in_features = weight.shape[::-1] if self.transposed else weight.shape
        options = {"bias": False, "device": device, "dtype": dtype}
        self.lora_A = nn.ModuleDict({ADAPTER: skip_init(nn.Linear, self.in_features, self.r, **options)})
        self.lora_B = nn.ModuleDict({ADAPTER: skip_init(nn.Linear, self.r, self.out_features, **options)})

    def _magnitude_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (self.out_features,)

    def _effective_weight(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
        delta = self.scaling * (lora_B @ lora_A)
        return gain * (weight + delta.T) if self.transposed else gain[:, None] * (weight + delta)

    def weight_norm(self) -> Tensor:
        """n (out,) = |W + s B A| per output feature, detached; float64 for a float64 weight, otherwise float32."""
        packed = packed_weight(self.base_layer) if self.quantised else None
        if packed is None:
            return super().weight_norm()
        with gathered(self):
            adapter = (whole(t) for t in (*self._factors(), self.magnitude))
            return norm_and_gain_nf4(packed, *adapter, scaling=self.scaling)[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self.merged:
            weight, bias = self.merged_weight, self.bias
            if self.quantised:
                bias = None if bias is None else bias.to(weight.dtype)
                return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
            return F.linear(x, weight.T if self.transposed else weight, bias)
        return self._quantised_forward(x) if self.quantised else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        base = self._modules["base_layer"]
        weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
        adapter = (*self._factors(), self.magnitude)
        self._refuse_shards(weight, *adapter)
        options = {"scaling": self.scaling, "transposed": self.transposed, "cache": self.norm_cache}
        if not (self.training and self.dropout):
            return dora_linear(x, weight, *adapter, bias, **options)
        dropped = F.dropout(x, self.dropout)
        y = dora_linear(dropped, weight, *adapter, bias, **options)
        return add_product(y, x - dropped, weight if self.transposed else weight.T)

    def _quantised_forward(self, x: Tensor) -> Tensor:
        base = self._modules["base_layer"]
        packed = packed_weight(base)
        dense = dense_weight(base) if packed is None else None
        dtype = getattr(base, "compute_dtype", None) or (
            dense.dtype if packed is None else autocast_dtype(x) or x.dtype
        )
        inputs = in_dtype(x, dtype) if x.is_floating_point() else x
        dropped, rest = inputs, None
        if self.training and self.dropout:
            dropped = F.dropout(inputs, self.dropout)
            rest = inputs - dropped
        adapter, bias, s = (*self._factors(), self.magnitude), parameter_of(base, "bias", None), self.scaling
        if packed is not None:
            y = linear_packed(dropped, packed, adapter, bias, scaling=s, cache=self.norm_cache, rest=rest)
        else:
            with without_autocast(x.device):  # the dtype is chosen
                norm, gain = norm_and_gain(dense, *adapter, scaling=s)
                again = partial(dense_in, base, dtype)
                y = linear_unpacked(dropped, dense.to(dtype), again, adapter, bias, norm, gain, scaling=s, rest=rest)
        return in_dtype(y, x.dtype)

    def to_base(self, dequantize: bool = True) -> nn.Module:
        """A plain layer with the adapter folded into its weight: of the base layer's type, or torch.nn.Linear in place
        of a quantised one. It shares no memory with this layer.

        Args:
            dequantize: False: a 4-bit base (NF4Linear, or bitsandbytes' Linear4bit in NF4) stays one; the folded weight
                is packed again, and a warning tells the error that this adds. It is of the size of NF4's own, some
                8 %, and often as large as what was learned: so it isn't the default.

        Raises:
            RuntimeError: the layer is merged. ValueError: dequantize is False and the base is quantised in another way.
        """
        if self.merged or not self.quantised:
            return super().to_base()
        packed = packed_weight(self.base_layer)
        if not dequantize:
            if packed is None:
                kind = type(self.base_layer).__name__
                raise ValueError(f"DoraLinear.to_base: dequantize: expected True for {kind}, which is not in NF4")
            layer, error = requantised_like(self.base_layer, self._merged(), packed)
            if not error.is_meta:
                warnings.warn(
                    "DoraLinear.to_base: packing the folded weight into 4 bits again adds an error of "
                    f"{error.item():.2e} (|packed - folded| / |folded|)",
                    stacklevel=2,
                )
            return layer
        weight = self._merged()
        options = {"bias": self.bias is not None, "device": weight.device, "dtype": weight.dtype}
        plain = skip_init(nn.Linear, self.in_features, self.out_features, **options)
        plain.requires_grad_(False).weight.copy_(weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain
