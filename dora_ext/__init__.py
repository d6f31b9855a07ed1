"""DoRA fine-tuning at the cost of a frozen linear layer."""

from dora_ext import _load
from dora_ext._load import load
from dora_ext.adapter import load_adapter, save_adapter
from dora_ext.config import DoraConfig
from dora_ext.files import AdapterError
from dora_ext.injection import inject
from dora_ext.kohya import load_kohya
from dora_ext.nn import (
    DoraConv1d,
    DoraConv1dLayer,
    DoraConv2d,
    DoraConv2dLayer,
    DoraConv3d,
    DoraConv3dLayer,
    DoraEmbedding,
    DoraEmbeddingLayer,
    DoraLinear,
    DoraLinearLayer,
    NF4Linear,
)
from dora_ext.norm_cache import invalidate_norms
from dora_ext.ops import dequantize_nf4, quantize_nf4
from dora_ext.quantizing import quantize_layers
from dora_ext.unloading import merge, trainable_parameters, unload, unmerge

__version__ = "0.1.0"
__all__ = [
    "load",
    "DoraLinear", "DoraEmbedding", "DoraConv1d", "DoraConv2d", "DoraConv3d",
    "DoraLinearLayer", "DoraEmbeddingLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer",
    "DoraConfig", "inject", "trainable_parameters", "merge", "unmerge", "unload",
    "save_adapter", "load_adapter", "load_kohya", "AdapterError",
    "NF4Linear", "quantize_layers", "quantize_nf4", "dequantize_nf4",
    "invalidate_norms",
]  # fmt: skip

_load.load_prebuilt()  # never compiles; without prebuilt kernels every op asks for dora_ext.load()
