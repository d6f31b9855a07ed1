"""DoraEmbedding: a frozen embedding and its DoRA adapter in one module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dora_embedding
from .base import ADAPTER, DoraBase, parameter_of


class DoraEmbedding(DoraBase):
    """y = g * (W[ids] + s A[:, ids]^T B^T), with g = m / n (arXiv 2402.09353, equation 5).

    Shapes: ids any, W (num_embeddings, dim), A (r, num_embeddings), B (dim, r), m and n (dim,): the norm is taken per
    embedding dimension over the whole vocabulary.

    Args:
        num_embeddings ... sparse, device, dtype: as torch.nn.Embedding has them; W is frozen, and A's gradient is
            dense whatever `sparse` says. With `max_norm`, the rows looked up of W and of A^T are scaled down in place.
        r, alpha, use_rslora, adapter_dtype: as in DoraLinear.
        dropout: kept for its name in saved adapters; ids cannot be dropped, and PEFT doesn't either.

    `from_base` wraps torch.nn.Embedding and its kin that scale their result by `embed_scale` (Gemma's); the norm is
    that of the unscaled weights.
    """

    transposed = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._wrap(base, r, alpha, dropout, use_rslora, adapter_dtype)

    def _check_base(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Embedding):
            raise TypeError(f"DoraEmbedding: layer: expected torch.nn.Embedding, got {type(layer).__name__}")
        scale = getattr(layer, "embed_scale", 1.0)
        if not (isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)):
            raise ValueError(f"DoraEmbedding: layer: expected one number as its embed_scale, got {scale!r}")

    def _add_factors(self, weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.base_layer.padding_idx
        # Entries of a ParameterDict, as in PEFT: the keys are lora_embedding_A.default and lora_embedding_B.default.
        options = {"device": device, "dtype": dtype}
        lora_A = nn.Parameter(torch.empty(self.r, self.num_embeddings, **options))
        lora_B = nn.Parameter(torch.empty(self.embedding_dim, self.r, **options))
        self.lora_embedding_A = nn.ParameterDict({ADAPTER: lora_A})
        self.lora_embedding_B = nn.ParameterDict({ADAPTER: lora_B})

    def _magnitude_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (self.embedding_dim,)

    def _reset_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        modules = self._modules  # past nn.Module's own look-ups, as in DoraBase
        return parameter_of(modules["lora_embedding_A"], ADAPTER), parameter_of(modules["lora_embedding_B"], ADAPTER)

    def _effective_weight(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, gain: Tensor) -> Tensor:
        return gain * (weight + self.scaling * (lora_A.T @ lora_B.T))

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape, int32 or int64 -> (*ids.shape, dim) in W's dtype. IndexError: an id out of range."""
        base = self._modules["base_layer"]
        # A scale that lives on the device is multiplied with there: reading it would wait for the device.
        scale = getattr(base, "embed_scale", 1.0)
        fused = 1.0 if isinstance(scale, Tensor) else scale
        if self.merged:
            y = F.embedding(ids, self.merged_weight, base.padding_idx, base.max_norm, base.norm_type)
            y = y if fused == 1.0 else y * fused
        else:
            # max_norm changes W, so that the norm can be taken only after it has.
            adapter = (*self._factors(), self.magnitude)
            weight = parameter_of(base, "weight")
            norm, gain = (None, None) if base.max_norm is not None else self._norm_and_gain(weight, *adapter)
            y = dora_embedding(
                ids, weight, *adapter, scaling=self.scaling, padding_idx=base.padding_idx,
                max_norm=base.max_norm, norm_type=base.norm_type, scale_grad_by_freq=base.scale_grad_by_freq,
                embed_scale=fused, norm=norm, gain=gain,
            )  # fmt: skip
        return y * scale.to(y.dtype) if isinstance(scale, Tensor) else y
