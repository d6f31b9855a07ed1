"""What the whole layers (base and adapter in one module) share: checks, parameters, merging.

A layer computes y = g * (x (W + s B A)^T) + bias with g = m / |W + s B A| (DoRA, arXiv 2402.09353, equation 5); the
norm is a constant of the backward pass (section 4.3). W and the bias are frozen; A, B and m are trained.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import copy_whole, gathered, is_sharded, whole
from ..norm_cache import NormCache
from ..ops import norm_and_gain
from ..ops._registry import accumulate_dtype, without_autocast
from .base_weight import FLOAT_DTYPES, copy_with_weight, dense_weight, parameter_of

ADAPTER = "default"  # PEFT's name of a model's first adapter: state_dict keys carry it


class Magnitude(nn.Module):
    """Holds m as `weight`, so that the state_dict key is PEFT's, lora_magnitude_vector.default.weight."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class DoraBase(nn.Module):
    """Base class of DoraLinear, DoraEmbedding and DoraConv1d/2d/3d.

    Attributes:
        base_layer: the frozen layer; its weight is never written to.
        r, alpha, use_rslora, dropout: as given. scaling: s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
        quantised: the base layer's weight is packed; it is unpacked for each product.
        norm_cache: the norm as of the last forward, not part of the state_dict.

    A subclass says which base layers it takes (`_check_base`), makes A and B (`_add_factors`), and has
    `_effective_weight` and `forward`. `transposed` says that W is (in, out).
    """

    transposed = False

    @classmethod
    def from_base(
        cls,
        layer: nn.Module,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ):
        """A DoRA layer around `layer`, whose weight is shared, not copied, and frozen. B A starts at 0 and m at the
        norm of W, so that the result is `layer`'s.

        Raises:
            TypeError: a layer of another type, integer or complex weights. ValueError: r, alpha, dropout out of range.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._wrap(layer, r, alpha, dropout, use_rslora, adapter_dtype)
        return self

    def _wrap(
        self,
        layer: nn.Module,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        check_options(type(self).__name__, r, alpha, dropout, adapter_dtype)
        self._check_base(layer)
        if any(map(is_sharded, layer.parameters())):
            raise ValueError(f"{type(self).__name__}: layer: FSDP2 has sharded it already; wrap it before fully_shard")
        with gathered(layer):
            weight = dense_weight(layer)
            self._check_weight(weight)
            self.base_layer = layer
            self.quantised = weight is not layer.weight
            self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, float(dropout), bool(use_rslora)
            self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
            self.norm_cache = NormCache()
            self.register_buffer("merged_weight", None, persistent=False)
            half = weight.dtype in (torch.bfloat16, torch.float16)
            # Small updates would vanish in half precision; PEFT keeps its adapters in float32 for the same reason.
            dtype = adapter_dtype or (torch.float32 if half else weight.dtype)
            self._add_factors(weight, weight.device, dtype)
            self.lora_magnitude_vector = nn.ModuleDict(
                {ADAPTER: Magnitude(self._magnitude_shape(weight), weight.device, dtype)}
            )
            self.reset_parameters()
        layer.requires_grad_(False)

    def _check_weight(self, weight: Tensor) -> None:
        name = type(self).__name__
        if isinstance(weight, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"{name}: layer: its weight is not initialised yet; run a forward of the lazy layer first")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: layer: expected a weight in bfloat16, float16, float32 or float64, got {weight.dtype}"
            )

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        modules = self._modules  # every forward comes here: nn.Module's own look-up costs several times as much
        lora_A, lora_B = modules["lora_A"]._modules[ADAPTER], modules["lora_B"]._modules[ADAPTER]
        return parameter_of(lora_A, "weight"), parameter_of(lora_B, "weight")

    @property
    def magnitude(self) -> nn.Parameter:
        """m, one number per output feature; a convolution's is (1, out, 1, ...), as PEFT keeps it."""
        return parameter_of(self._modules["lora_magnitude_vector"]._modules[ADAPTER], "weight")

    @property
    def weight(self) -> Tensor:
        """The weight that the forward multiplies with: the merged one if there is one, else the base layer's."""
        return self.merged_weight if self.merged else self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def merged(self) -> bool:
        return self._buffers["merged_weight"] is not None

    def reset_parameters(self) -> None:
        """Start the adapter anew: B A = 0 and m = |W|. W and the bias stay; on the meta device nothing is done."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.reset_parameters: the layer is merged: call unmerge() first")
        with torch.no_grad(), gathered((*self._factors(), self.magnitude), write=True):
            self._reset_factors(*self._factors())
            if not self.magnitude.is_meta:
                copy_whole(self.magnitude, self.weight_norm().view(self.magnitude.shape))

    def _reset_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def weight_norm(self) -> Tensor:
        """n (out,) = |W + s B A| per output feature, detached; float64 for a float64 weight, otherwise float32."""
        with gathered(self):
            return norm_and_gain(*self._tensors(), scaling=self.scaling, transposed=self.transposed)[0]

    def _tensors(self) -> tuple[Tensor, ...]:
        """W (dense), A, B, m: all of them, wherever FSDP2 keeps their parts."""
        return tuple(whole(t) for t in (self._dense_weight(), *self._factors(), self.magnitude))

    def _dense_weight(self) -> Tensor:
        return dense_weight(self.base_layer) if self.quantised else self.base_layer.weight

    def _refuse_shards(self, *tensors: Tensor) -> None:
        """W, A, B, m, as the forward has them at hand."""
        if any(map(is_sharded, tensors)):
            raise RuntimeError(
                f"{type(self).__name__}: a DTensor in its forward: call fully_shard on it or on a module around it, "
                "not on its base_layer alone, whose forward it never calls"
            )

    def _norm_and_gain(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """n and g (out,) of W, A, B, m."""
        self._refuse_shards(*tensors)
        # A dequantised weight is another tensor each time: nothing to remember it by.
        cache = None if self.quantised else self.norm_cache
        return norm_and_gain(*tensors, scaling=self.scaling, transposed=self.transposed, cache=cache)

    def merge(self) -> None:
        """Fold the adapter into one weight: from here on, the forward costs what the base layer's does.

        The folded weight is computed in float32 (float64) and rounded once. The base layer and its weight stay as they
        are, also for whoever shares them, and state_dict is that of the unmerged layer. Later changes to A, B, m
        have no effect until `unmerge`. Raises RuntimeError if the layer is merged already.
        """
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.merge: the layer is merged already")
        self.merged_weight = self._merged()

    def unmerge(self) -> None:
        """Take `merge` back: the very same bits as before. Raises RuntimeError if the layer is not merged."""
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}.unmerge: the layer is not merged")
        self.merged_weight = None

    @torch.no_grad()
    def _merged(self) -> Tensor:
        """g * (W + s B A) in W's layout and dtype."""
        with gathered(self), without_autocast(self.magnitude.device):
            weight, lora_A, lora_B, magnitude = self._tensors()
            gain = norm_and_gain(weight, lora_A, lora_B, magnitude, scaling=self.scaling, transposed=self.transposed)[1]
            dtype = accumulate_dtype(weight.dtype)
            return self._effective_weight(*(t.to(dtype) for t in (weight, lora_A, lora_B)), gain).to(weight.dtype)

    def to_base(self) -> nn.Module:
        """A plain layer of the base layer's type with the adapter folded into its weight; it shares no memory with this
        one. Raises RuntimeError if the layer is merged."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.to_base: the layer is merged: call unmerge() first")
        weight = nn.Parameter(self._merged(), requires_grad=False)
        return copy_with_weight(self.base_layer, weight)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.load_state_dict: the layer is merged: call unmerge() first")
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        text = f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, use_rslora={self.use_rslora}"
        return text + (", merged=True" if self.merged else "")


def check_options(name: str, r: int, alpha: float, dropout: float, adapter_dtype: torch.dtype | None) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"{name}: r: expected a whole number, got {r!r}")
    if r <= 0:
        raise ValueError(f"{name}: r: expected at least 1, got {r}")
    for argument, value in (("alpha", alpha), ("dropout", dropout)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument}: expected a number, got {value!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"{name}: alpha: expected a finite number, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout: expected it in [0, 1), got {dropout}")
    if adapter_dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(f"{name}: adapter_dtype: expected a float dtype, got {adapter_dtype}")
