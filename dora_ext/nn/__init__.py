"""Modules: whole DoRA layers (base and adapter in one), and PEFT's five DoRA layer classes on our kernels."""

from .base import DoraBase
from .conv import DoraConv1d, DoraConv2d, DoraConv3d
from .embedding import DoraEmbedding
from .layers import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer, DoraEmbeddingLayer, DoraLinearLayer
from .linear import DoraLinear
from .nf4_linear import NF4Linear

__all__ = [
    "DoraBase",
    "DoraConv1d",
    "DoraConv1dLayer",
    "DoraConv2d",
    "DoraConv2dLayer",
    "DoraConv3d",
    "DoraConv3dLayer",
    "DoraEmbedding",
    "DoraEmbeddingLayer",
    "DoraLinear",
    "DoraLinearLayer",
    "NF4Linear",
]
