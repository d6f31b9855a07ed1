"""PEFT's DoRA layers on our kernels: drop-ins for the classes of peft.tuners.lora.dora (release 0.21).

Such a layer holds the magnitude m as `self.weight` and gives what is to be added to a base layer's finished output.
A and B belong to PEFT and come with each call, as modules (linear, convolutions) or tensors (embeddings).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import gathered
from ..norm_cache import NormCache
from ..ops import dora_delta, norm_and_gain, norm_and_gain_nf4, weight_norm
from ..ops._registry import accumulate_dtype, autocast_dtype, without_autocast
from .base_weight import FLOAT_DTYPES, dense_weight, packed_weight
from .conv import convolve, delta_weight, dense_kernel
from .factors import are_plain, matrix_of

ENABLE_DORA_CACHING = False
"""In eval mode, take norms as they were at the first forward, without looking whether a weight has changed since.
PEFT's own switch (peft.helpers.DoraCaching) does the same. Without it, norms are reused only while nothing changed."""


def caching_enabled() -> bool:
    peft_dora = sys.modules.get("peft.tuners.lora.dora")
    return ENABLE_DORA_CACHING or getattr(peft_dora, "ENABLE_DORA_CACHING", False)


def is_number(scaling: float | Tensor) -> bool:
    return not isinstance(scaling, Tensor)


class DoraLinearLayer(nn.Module):
    """(g - 1) * W x + g * s B A x with g = m / |W + s B A| (arXiv 2402.09353, equation 5); W is (in, out) with
    `fan_in_fan_out`. The norm is float32 (float64 for float64 weights) and carries no gradient (section 4.3)."""

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self.norm_cache = NormCache()
        self._dora_cache: dict[str, Any] = {}  # filled while caching_enabled(); not part of the state_dict

    def _cache_store(self, key: str, value: Any) -> None:
        self._dora_cache[key] = value

    def _cache_get(self, key: str, default: Any = None) -> Any:
        return self._dora_cache.get(key, default)

    def _cache_clear(self) -> None:
        self._dora_cache.clear()

    def _cached(self, key: str, adapter_name: str | None, compute: Callable) -> Any:
        """PEFT's rule: kept in eval mode, while caching is switched on, for calls that name their adapter."""
        if self.training or adapter_name is None or not caching_enabled():
            self._cache_clear()
            return compute()
        value = self._cache_get(f"{key}-{adapter_name}")
        if value is None:
            value = compute()
            self._cache_store(f"{key}-{adapter_name}", value)
        return value

    def train(self, mode: bool = True):
        if mode:
            self._cache_clear()
        return super().train(mode)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """|weight + scaling * lora_weight| per output feature, (out,), for a finished lora_weight = B A (out, in).

        Returns float32 (float64 for float64), where PEFT rounds to weight's dtype; for a norm of 0 the smallest normal
        number, because PEFT's merging divides by it.
        """
        norm = self._cached("weight-norm", adapter_name, lambda: self._dense_norm(weight, lora_weight, scaling))
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def _dense_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float) -> Tensor:
        dtype = accumulate_dtype(torch.promote_types(weight.dtype, lora_weight.dtype))
        weight = weight.T if self.fan_in_fan_out else weight
        return torch.linalg.norm(weight.to(dtype) + scaling * lora_weight.to(dtype), dim=1)

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
        """B A (out, in), differentiable. The forward does without it."""

        def compute() -> Tensor:
            A, B = self._factors(lora_A, lora_B)
            return B @ A

        return self._cached("lora-weight", adapter_name, compute)

    def _factors(self, lora_A: nn.Module, lora_B: nn.Module) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        if are_plain(lora_A, lora_B):
            return lora_A.weight, lora_B.weight
        return matrix_of(lora_A, lora_A.in_features), matrix_of(lora_B, lora_B.in_features)

    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Make `self.weight`, m = |W + s B A|, on lora_A's device (or the CPU), in the dtype and shape that PEFT has.

        lora_A and lora_B are the weights themselves. Quantised bases are dequantised, ZeRO-3's parameters gathered.
        """
        with gathered(base_layer):
            weight = dense_weight(base_layer).detach().to(lora_A.device)
            norm = weight_norm(weight, lora_A, lora_B, scaling=scaling, transposed=self._transposed(weight))
        dtype = torch.promote_types(weight.dtype, lora_A.dtype)
        norm = self._magnitude_view(norm, weight.dim()).to("cpu" if place_on_cpu else norm.device, dtype)
        self.weight = nn.Parameter(norm, requires_grad=True)

    def _transposed(self, weight: Tensor) -> bool:
        return self.fan_in_fan_out and weight.dim() == 2

    def _magnitude_view(self, per_feature: Tensor, dims: int) -> Tensor:
        """As PEFT shapes m: (out,); of a convolution (1, out, 1, ...)."""
        return per_feature if dims == 2 else per_feature.view(1, -1, *([1] * (dims - 2)))

    def _weight_and_norm(
        self,
        base_layer: nn.Module,
        scaling: float,
        adapter_name: str | None,
        factors: Callable,
        norm_only: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """W, dense, and n (out,). `factors` gives A and B, where they are needed. norm_only: W may be None."""
        packed = None if self.fan_in_fan_out or not is_number(scaling) else packed_weight(base_layer)
        weight = dense_weight(base_layer) if packed is None or not norm_only else None

        def compute() -> Tensor:
            with torch.no_grad():
                A, B = factors()
                if packed is not None:
                    m = self.weight.to(packed.packed.device)
                    return norm_and_gain_nf4(packed, A, B, m, scaling=scaling, cache=self.norm_cache)[0]
                if not is_number(scaling) or weight.dtype not in FLOAT_DTYPES:
                    return self._plain_norm(weight, A, B, scaling)
                cache = self.norm_cache if weight is base_layer.weight else None
                m = self.weight.to(weight.device)
                transposed = self._transposed(weight)
                return norm_and_gain(weight, A, B, m, scaling=scaling, transposed=transposed, cache=cache)[0]

        return weight, self._cached("weight-norm", adapter_name, compute)

    def _plain_norm(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
        """n (out,) in plain PyTorch: for a scaling that is a tensor (peft.utils.hotswap), which to read as a number
        would wait for the device, and for weights in dtypes (float8) that the kernels don't take."""
        weight = weight if weight.dtype in FLOAT_DTYPES else weight.to(A.dtype)
        with without_autocast(A.device):
            if weight.dim() == 2:
                return self._dense_norm(weight, B @ A, scaling)
            weight = dense_kernel(weight, A.shape[1] // weight.shape[1])
            return self._dense_norm(weight, delta_weight(A, B), scaling).flatten()

    def forward(
        self, x: Tensor, *, lora_A, lora_B, scaling: float, base_layer: nn.Module, base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:  # fmt: skip
        """What is to be added to the base layer's output.

        Args:
            x: (..., in), after dropout. lora_A, lora_B: nn.Linear (in -> r, r -> out), or what wraps them.
            base_result: the base layer's output for x, its bias included; None if it was for another x (dropout):
                then the base product is done again.

        Returns:
            (..., out) in the dtype of the base product (PEFT: in the widest one around).
        """
        weight, norm = self._weight_and_norm(
            base_layer, scaling, adapter_name, lambda: self._factors(lora_A, lora_B), norm_only=base_result is not None
        )
        dtype = _product_dtype(x, weight, base_result)
        bias = None if base_result is None else base_layer.bias
        if base_result is None:
            base_result = F.linear(x.to(dtype), (weight.T if self.fan_in_fan_out else weight).to(dtype))
        if not (are_plain(lora_A, lora_B) and is_number(scaling)):
            return self._compose(base_result, lora_B(lora_A(x)), norm, bias, scaling)
        h = F.linear(x.to(dtype), lora_A.weight.to(dtype))
        m = self.weight.to(norm.device)
        return dora_delta(base_result, h, lora_B.weight, m, norm, bias, scaling=scaling)

    def _compose(
        self, base_result: Tensor, lora_result: Tensor, norm: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        """dora_delta for a B that could only be called, in plain PyTorch."""
        gain = gain_of(self.weight, norm.view_as(self.weight))
        base_only = base_result if bias is None else base_result - bias.view_as(gain)
        return ((gain - 1) * base_only + gain * scaling * lora_result).to(base_result.dtype)

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n, differentiable in m; 0, and no gradient, where n = 0."""
    return magnitude.to(norm.device) / norm.masked_fill(norm == 0, torch.inf)


def _product_dtype(x: Tensor, weight: Tensor, base_result: Tensor | None) -> torch.dtype:
    """PEFT casts x to the adapter's float32 over a half-precision base; the products stay in the base's dtype here."""
    if base_result is not None:
        return base_result.dtype
    chosen = autocast_dtype(x)
    if chosen is not None:
        return chosen
    half = (torch.bfloat16, torch.float16)
    return weight.dtype if x.dtype == torch.float32 and weight.dtype in half else x.dtype


class DoraEmbeddingLayer(DoraLinearLayer):
    """The same for embeddings: one magnitude per embedding dimension, W (vocab, dim), `fan_in_fan_out` True."""

    def get_lora_weight(self, lora_A: Tensor, lora_B: Tensor, adapter_name: str | None = None) -> Tensor:
        """(lora_A lora_B)^T, (dim, vocab), for lora_A (vocab, r) and lora_B (r, dim)."""
        return self._cached("lora-weight", adapter_name, lambda: (lora_A @ lora_B).T)

    def forward(
        self, x: Tensor, *, lora_A: Tensor, lora_B: Tensor, scaling: float, base_layer: nn.Module, embed_fn,
        adapter_name: str = "default",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """g (dim,) and g * s * embed_fn(x, lora_A) lora_B: the result is g * base_layer(x) plus the second.

        lora_A (vocab, r) and lora_B (r, dim) are PEFT's parameters transposed; embed_fn looks rows up.
        """
        _, norm = self._weight_and_norm(base_layer, scaling, adapter_name, lambda: (lora_A.T, lora_B.T))
        gain = gain_of(self.weight, norm)
        return gain, gain * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The same for convolutions: n per output channel over all the rest, m (1, out, 1, ...)."""

    def _dense_norm(self, weight: Tensor, lora_weight: Tensor, scaling: float) -> Tensor:
        """(1, out, 1, ...) for lora_weight of weight's shape."""
        if lora_weight.shape != weight.shape:
            raise ValueError(
                f"get_weight_norm: lora_weight: expected weight's shape {tuple(weight.shape)}, got "
                f"{tuple(lora_weight.shape)}; a grouped convolution's adapter is dense and has its norm in update_layer"
            )
        dtype = accumulate_dtype(torch.promote_types(weight.dtype, lora_weight.dtype))
        effective = weight.to(dtype) + scaling * lora_weight.to(dtype)
        return self._magnitude_view(effective.flatten(1).norm(dim=1), weight.dim())

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Tensor:
        """B A, (out, in * kernel), differentiable; for a grouped base over all input channels."""
        return self._cached("lora-weight", adapter_name, lambda: delta_weight(lora_A.weight, lora_B.weight).flatten(1))

    def forward(
        self, x: Tensor, *, lora_A: nn.Module, lora_B: nn.Module, scaling: float, base_layer: nn.Module,
        base_result: Tensor | None = None, adapter_name: str = "default",
    ) -> Tensor:  # fmt: skip
        """What is to be added to the base layer's output; arguments as in DoraLinearLayer, lora_A and lora_B nn.ConvNd.

        A is applied with the base layer's dilation and padding_mode, which PEFT's lora_A modules lack.
        """
        unbatched = x.dim() == base_layer.weight.dim() - 1
        if unbatched:
            x, base_result = x[None], None if base_result is None else base_result[None]
        weight, norm = self._weight_and_norm(base_layer, scaling, adapter_name, lambda: (lora_A.weight, lora_B.weight))
        dtype = _product_dtype(x, weight, base_result)
        bias = None if base_result is None else base_layer.bias
        if base_result is None:
            base_result = convolve(base_layer, x.to(dtype), weight.to(dtype), None, base_layer.groups)
        if not (are_plain(lora_A, lora_B) and is_number(scaling)):
            result = self._compose(base_result, lora_B(lora_A(x)), norm, bias, scaling)
            return result[0] if unbatched else result
        h = convolve(base_layer, x.to(dtype), lora_A.weight.to(dtype), None, groups=1)
        matrix = lora_B.weight.flatten(1)
        if base_layer.groups > 1:
            matrix = torch.block_diag(*matrix.chunk(base_layer.groups))
        m = self.weight.flatten().to(norm.device)
        result = dora_delta(base_result, h, matrix, m, norm, bias, scaling=scaling, channels_first=True)
        return result[0] if unbatched else result


class DoraConv1dLayer(_DoraConvNdLayer):
    """For nn.Conv1d."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """For nn.Conv2d."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """For nn.Conv3d."""
