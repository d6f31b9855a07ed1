"""DoraLinear: a frozen linear layer and its DoRA adapter in one module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..ops import dora_linear
from .base import ADAPTER, DoraBase


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

    `from_base` wraps torch.nn.Linear, transformers' Conv1D and bitsandbytes' Linear4bit. x must have W's dtype (any
    dtype if W is quantised), or autocast's.
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

    def _check_base(self, layer: nn.Module) -> None:
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

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    def _effective_weight(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
        delta = self.scaling * (lora_B @ lora_A)
        return gain * (weight + delta.T) if self.transposed else gain[:, None] * (weight + delta)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        weight = self.merged_weight if self.merged else self._dense_weight()
        if self.quantised:  # bitsandbytes, too, computes in the weight's dtype and answers in that of x
            return self._forward(x.to(weight.dtype), weight).to(x.dtype)
        return self._forward(x, weight)

    def _forward(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = self.bias
        if self.merged:
            return F.linear(x, weight.T if self.transposed else weight, bias)
        adapter = (*self._factors(), self.magnitude)
        norm, gain = self._norm_and_gain(weight, *adapter)
        options = {"scaling": self.scaling, "transposed": self.transposed, "norm": norm, "gain": gain}
        if not (self.training and self.dropout):
            return dora_linear(x, weight, *adapter, bias, **options)
        dropped = F.dropout(x, self.dropout)
        y = dora_linear(dropped, weight, *adapter, bias, **options)
        # What dropout took away still goes through the base layer, added inside the product: one rounding less.
        rest = (x - dropped).reshape(-1, self.in_features)
        weight_t = weight if self.transposed else weight.T
        return torch.addmm(y.reshape(-1, self.out_features), rest, weight_t).view_as(y)

    def to_base(self) -> nn.Module:
        """A plain layer with the adapter folded into its weight: of the base layer's type, or torch.nn.Linear in place
        of a quantised one. It shares no memory with this layer. Raises RuntimeError if the layer is merged."""
        if self.merged or not self.quantised:
            return super().to_base()
        weight = self._merged()
        options = {"bias": self.bias is not None, "device": weight.device, "dtype": weight.dtype}
        plain = skip_init(nn.Linear, self.in_features, self.out_features, **options)
        plain.requires_grad_(False).weight.copy_(weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain
