"""DoraConv1d, DoraConv2d, DoraConv3d: a frozen convolution and its DoRA adapter in one module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..ops import dora_conv
from .base import ADAPTER, DoraBase, parameter_of

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def convolve(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The convolution of `layer` (stride, padding, padding_mode, dilation) with other weights."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return _CONVOLUTIONS[weight.dim() - 3](x, weight, bias, layer.stride, padding, layer.dilation, groups)


def delta_weight(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """B A as one dense kernel (out, in, *k): A (r, in, *k) dense; B (out, r / groups, 1, ...) grouped, so that an
    output channel of group q sees the ranks of group q, over all input channels."""
    groups = lora_A.shape[0] // lora_B.shape[1]
    parts = zip(lora_B.flatten(1).chunk(groups), lora_A.flatten(1).chunk(groups), strict=True)
    return torch.cat([b @ a for b, a in parts]).view(-1, *lora_A.shape[1:])


def dense_kernel(weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution's W (out, in / groups, *k) as the dense kernel (out, in, *k) that does the same."""
    if groups == 1:
        return weight
    out, inputs = weight.shape[:2]
    dense = weight.new_zeros(out, inputs * groups, *weight.shape[2:])
    for q, rows in enumerate(weight.chunk(groups)):
        dense[q * len(rows) : (q + 1) * len(rows), q * inputs : (q + 1) * inputs] = rows
    return dense


class _DoraConvNd(DoraBase):
    """y = g * (conv(x, W) + s B conv(x, A)) + bias, with g = m / n per output channel (arXiv 2402.09353, equation 5).

    Shapes: x (batch, in, *spatial) or (in, *spatial), W (out, in / groups, *k); A (r, in, *k) is a convolution with all
    of the base's geometry (stride, padding, padding_mode, dilation), but dense; B (out, r / groups, 1, ...) is a 1x1
    convolution with the base's groups; m (1, out, 1, ...); n (out,) is the norm of the whole effective kernel.

    Args:
        in_channels ... padding_mode, device, dtype: as the torch.nn twin has them; W and bias are frozen.
        r: rank, a multiple of `groups`. alpha, dropout, use_rslora, adapter_dtype: as in DoraLinear.

    With groups > 1 the effective kernel is dense: `merge` keeps one `groups` times as large as W, and `to_base` gives a
    convolution with one group.
    """

    base_class: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = self.base_class(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._wrap(base, r, alpha, dropout, use_rslora, adapter_dtype)

    def _check_base(self, layer: nn.Module) -> None:
        if not isinstance(layer, self.base_class):
            expected = f"torch.nn.{self.base_class.__name__}"
            raise TypeError(f"{type(self).__name__}: layer: expected {expected}, got {type(layer).__name__}")

    def _add_factors(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        base = self.base_layer
        if self.r % base.groups:
            raise ValueError(
                f"{type(self).__name__}: r: expected a multiple of groups={base.groups}, got {self.r}: "
                "each group of output channels has its own ranks"
            )
        self.in_channels, self.out_channels, self.kernel_size = base.in_channels, base.out_channels, base.kernel_size
        self.stride, self.padding, self.padding_mode = base.stride, base.padding, base.padding_mode
        self.dilation, self.groups = base.dilation, base.groups
        options = {"bias": False, "device": device, "dtype": dtype}
        lora_A = skip_init(
            self.base_class, base.in_channels, self.r, base.kernel_size, base.stride, base.padding, base.dilation,
            padding_mode=base.padding_mode, **options,
        )  # fmt: skip
        lora_B = skip_init(self.base_class, self.r, base.out_channels, 1, groups=base.groups, **options)
        self.lora_A, self.lora_B = nn.ModuleDict({ADAPTER: lora_A}), nn.ModuleDict({ADAPTER: lora_B})

    def _magnitude_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (1, weight.shape[0], *([1] * (weight.dim() - 2)))

    def _effective_weight(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
        effective = dense_kernel(weight, self.groups) + self.scaling * delta_weight(lora_A, lora_B)
        return gain.view(-1, *([1] * (weight.dim() - 1))) * effective

    def to_base(self) -> nn.Module:
        """A plain convolution with the adapter folded into its weight, with one group where the base layer has more. It
        shares no memory with this layer. Raises RuntimeError if the layer is merged."""
        base = super().to_base()
        base.groups = 1
        return base

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in, *spatial) or (in, *spatial) -> the same with `out` channels."""
        base = self._modules["base_layer"]
        weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
        if self.merged:
            return convolve(base, x, self.merged_weight, bias, groups=1)
        adapter = (*self._factors(), self.magnitude)
        norm, gain = self._norm_and_gain(weight, *adapter)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        y = dora_conv(
            dropped, weight, *adapter, None if dropped is not x else bias,
            scaling=self.scaling, stride=base.stride, padding=base.padding, dilation=base.dilation,
            groups=base.groups, padding_mode=base.padding_mode, norm=norm, gain=gain,
        )  # fmt: skip
        # What dropout took away still goes through the base layer.
        return y if dropped is x else y + convolve(base, x - dropped, weight, bias, base.groups)


class DoraConv1d(_DoraConvNd):
    __doc__ = _DoraConvNd.__doc__
    base_class = nn.Conv1d


class DoraConv2d(_DoraConvNd):
    __doc__ = _DoraConvNd.__doc__
    base_class = nn.Conv2d


class DoraConv3d(_DoraConvNd):
    __doc__ = _DoraConvNd.__doc__
    base_class = nn.Conv3d
