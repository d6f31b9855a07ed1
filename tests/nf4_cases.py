"""What the tests of NF4 share: bits, shapes, weights, and states as bitsandbytes would hold them."""

from types import SimpleNamespace

import torch
from torch import Tensor

from dora_ext.ops import NF4Tensor
from dora_ext.ops.nf4 import CODEBOOK
from dora_ext.testing import TOLERANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, signs of zeros included; a NaN equals any other."""
    a, b = a.cpu(), b.cpu()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    if a.is_floating_point():
        a, b = a.where(~a.isnan(), 7.0), b.where(~b.isnan(), 7.0)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def unpack(packed: Tensor, numel: int) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel].long()


def reference_dequantize(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    numel, scale = q.shape.numel(), q.absmax
    if q.nested:
        nested = q.nested_absmax.repeat_interleave(q.nested_blocksize)[: scale.numel()]
        scale = q.nested_code[scale.long()] * nested + q.offset
    scale = scale.repeat_interleave(q.blocksize)[:numel]
    return (CODEBOOK.to(scale.device)[unpack(q.packed, numel)] * scale).to(dtype).view(q.shape)


def weights(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """`shape` should hold some thousand weights, so that every code and a few blocks of zeros come up."""
    half = dtype == torch.float16
    x = torch.randn(shape)
    x = x * {"usual": 1.0, "tiny": 1e-7 if half else 1e-39, "huge": 1e4 if half else 5e37}[kind]
    x.view(-1)[: x.numel() // 4] = 0
    return x.to(dtype).to(device)


# Odd counts, odd rows, less than a block, many blocks and a few over. Rows of an even number of weights that end inside
# a block are left out: bitsandbytes' AVX-512 dequantisation reads a wrong scale there.
def shapes(blocksize: int) -> list[tuple[int, ...]]:
    return [(1,), (7,), (blocksize + 1,), (3, 2 * blocksize), (2, 3, 5), (97, 131), (16 * blocksize + 5,)]


def state_of(q: NF4Tensor, **changes) -> SimpleNamespace:
    """What bitsandbytes' QuantState would hold."""
    inner = SimpleNamespace(absmax=q.nested_absmax, code=q.nested_code, blocksize=q.nested_blocksize)
    fields = {
        "absmax": q.absmax,
        "shape": q.shape,
        "code": CODEBOOK.to(q.packed.device, copy=True),
        "dtype": q.dtype,
        "blocksize": q.blocksize,
        "quant_type": "nf4",
        "offset": q.offset,
        "state2": inner if q.nested else None,
    }
    return SimpleNamespace(**{**fields, **changes})


def norm_tolerance(device: str, dtype: torch.dtype) -> float:
    """Relative error of a norm from packed weights of `dtype`. Without a kernel of its own for it, a device takes the
    dense norm, for which A and B are rounded to W's dtype."""
    rounded = device != "cpu" and dtype != torch.float32
    return TOLERANCE[dtype] if rounded else 1e-6


class Dequantisations:
    """Counts those of a block, bitsandbytes' and ours, also those inside other ops."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.profile.__exit__(*error)
        names = [event.name for event in self.profile.events()]
        self.count = sum(name in ("dora_ext::dequantize_nf4", "bitsandbytes::dequantize_4bit") for name in names)
