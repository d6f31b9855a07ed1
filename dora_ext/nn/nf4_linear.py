"""NF4Linear: a frozen linear layer that keeps its weight in 4 bits itself, without bitsandbytes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4


class NF4Linear(nn.Linear):
    """y = x W^T + bias with W (out, in) packed in NF4: DoraLinear's base with `quantize="nf4"`.

    The state_dict has `weight` (uint8, two weights a byte), `absmax` (float32 per block, or uint8 when nested), and
    when nested `nested_absmax`, `nested_code` (float32) and `offset` (float32): buffers, tensors of plain dtypes that
    safetensors takes. Block size, shape and `dtype`, that of the weight before, belong to the module, as a Linear's
    shape does. `.to(dtype)`, `.half()` and their like move the buffers and leave their dtypes alone; x decides what is
    computed in. Under DistributedDataParallel say broadcast_buffers=False: otherwise it sends all weights around at
    every forward.
    """

    def __init__(self, weight: NF4Tensor, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a dense weight
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear: weight: expected shape (out, in), got {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.blocksize, self.nested_blocksize, self.dtype = weight.blocksize, weight.nested_blocksize, weight.dtype
        # One code table serves all weights; safetensors refuses tensors that share memory.
        code = None if weight.nested_code is None else weight.nested_code.clone()
        self.register_buffer("weight", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("nested_absmax", weight.nested_absmax)
        self.register_buffer("nested_code", code)
        self.register_buffer("offset", weight.offset)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, double_quant: bool = True, blocksize: int = 64, transposed: bool = False
    ) -> "NF4Linear":
        """`layer`'s weight, quantised; the bias is shared. `transposed`: that weight is (in, out).

        Raises:
            TypeError: its weight is not floating point. ValueError: blocksize.
        """
        weight = layer.weight.detach()
        return cls(quantize_nf4(weight.T if transposed else weight, blocksize, double_quant), layer.bias)

    @property
    def nf4(self) -> NF4Tensor:
        """The packed weight, sharing memory with this layer."""
        shape, tensors = torch.Size((self.out_features, self.in_features)), self._buffers  # past nn.Module's look-up
        nested = (tensors["nested_absmax"], tensors["nested_code"], tensors["offset"], self.nested_blocksize)
        return NF4Tensor(tensors["weight"], tensors["absmax"], self.blocksize, shape, self.dtype, *nested)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize_nf4(self.nf4).to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        buffers = {id(b) for b in self._buffers.values()}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in buffers and moved.dtype != t.dtype else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and (loaded.dtype, loaded.shape) != (buffer.dtype, buffer.shape):
                raise ValueError(
                    f"NF4Linear.load_state_dict: {prefix}{name}: expected {buffer.dtype} of shape "
                    f"{tuple(buffer.shape)} (blocksize {self.blocksize}, "
                    f"{'nested' if self.nested_absmax is not None else 'not nested'}), got {loaded.dtype} of shape "
                    f"{tuple(loaded.shape)}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        nested = self.nested_absmax is not None
        return f"{super().extra_repr()}, blocksize={self.blocksize}, double_quant={nested}, dtype={self.dtype}"


def requantised_like(base: nn.Module, weight: Tensor, q: NF4Tensor) -> tuple[nn.Module, Tensor]:
    """A layer of `base`'s type (NF4Linear or bitsandbytes' Linear4bit) that holds `weight` in NF4 in the way of `q`,
    base's own packed weight; and the relative error that packing added, |W packed - W| / |W| (a tensor)."""
    new = quantize_nf4(weight, q.blocksize, q.nested)
    reference = weight.float()
    error = (dequantize_nf4(new, torch.float32) - reference).norm() / reference.norm().clamp_min(1e-38)
    bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    if isinstance(base, NF4Linear):
        return NF4Linear(new, bias), error
    import bitsandbytes

    old = base.weight
    storage = getattr(old, "quant_storage", torch.uint8)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=q.blocksize, compress_statistics=q.nested, quant_type="nf4", quant_storage=storage
    )
    out, n_in = q.shape
    layer = type(base)(
        n_in, out, bias=bias is not None, compute_dtype=base.compute_dtype, compress_statistics=q.nested,
        quant_type="nf4", quant_storage=storage, device="meta",
    )  # fmt: skip
    layer.weight = bitsandbytes.nn.Params4bit(
        packed, quant_state=state, blocksize=q.blocksize, compress_statistics=q.nested, quant_type="nf4",
        quant_storage=storage, module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state, layer.bias = state, bias
    return layer, error
