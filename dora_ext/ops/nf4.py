"""NF4, bitsandbytes' 4-bit weights, bit for bit: quantise and dequantise."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._registry import fake

# The sixteen values, as csrc/nf4.h has them.
CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
NESTED_BLOCKSIZE = 256


def _dynamic_map() -> Tensor:
    """The 8-bit code of nested scales, (256,) ascending: 0, 1, and for each decade 10^-6 ... 1 twice as many midpoints
    of equal parts of [0.1, 1] as for the one before, with both signs. (Dettmers, arXiv 1511.04561.)"""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middle = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middle, -middle]
    return torch.cat(values).sort().values


DYNAMIC_MAP = _dynamic_map()


class NF4Tensor(NamedTuple):
    """A weight in NF4. The tensors are on one device; the fields are those of bitsandbytes' QuantState.

    packed: uint8 (ceil(numel / 2),), the first weight of a pair in the high nibble.
    absmax: one scale per `blocksize` weights: float32, or uint8 when nested.
    nested_absmax: float32, one per `nested_blocksize` scales; nested_code: float32 (256,); offset: float32 (): then the
        scale of a block is nested_code[absmax] * nested_absmax + offset. All three None: not nested.
    shape, dtype: of the weight before.
    """

    packed: Tensor
    absmax: Tensor
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def operands(self, dtype: torch.dtype | None = None) -> tuple:
        """The ops' arguments for this weight with values in `dtype`, by default its own."""
        nested = (self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize)
        return (self.packed, self.absmax, self.blocksize, self.shape, dtype or self.dtype, *nested)

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same weight on another device."""
        return NF4Tensor(*(v.to(device) if isinstance(v, Tensor) else v for v in self))


@fake("quantize_nf4")
def _(x, blocksize=64):
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((x.numel() + blocksize - 1) // blocksize, dtype=torch.float32)


@fake("quantize_absmax")
def _(absmax, code, blocksize=NESTED_BLOCKSIZE):
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    return codes, absmax.new_empty((absmax.numel() + blocksize - 1) // blocksize)


@fake("dequantize_nf4")
def _(
    packed,
    absmax,
    blocksize,
    shape,
    dtype,
    nested_absmax=None,
    nested_code=None,
    offset=None,
    nested_blocksize=NESTED_BLOCKSIZE,
    row_gain=None,
):
    return packed.new_empty(shape, dtype=dtype)


def quantize_nf4(weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Tensor:
    """Packs a weight into 4 bits each, with the codes and scales that bitsandbytes finds on the same device.

    Args:
        weight: any shape, any number of elements, bfloat16, float16, float32 (float64 is rounded to float32 first).
        blocksize: weights per scale, a power of two from 32 to 4096.
        double_quant: also store the scales in 8 bits (bitsandbytes' `compress_statistics`): 0.52 bytes a weight
            in place of 0.56, at blocksize 64.

    Raises:
        TypeError: weight is not floating point. ValueError: blocksize.
    """
    weight = weight.detach()
    packed, absmax = torch.ops.dora_ext.quantize_nf4.default(weight, blocksize)
    dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    if not double_quant or weight.numel() == 0:
        return NF4Tensor(packed, absmax, blocksize, weight.shape, dtype)
    code = DYNAMIC_MAP.to(weight.device)
    offset = absmax.mean()
    codes, nested = torch.ops.dora_ext.quantize_absmax.default(absmax - offset, code, NESTED_BLOCKSIZE)
    return NF4Tensor(packed, codes, blocksize, weight.shape, dtype, nested, code, offset)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight again, in one launch, nested scales included: codebook value times scale in float32, rounded once.

    Args:
        dtype: bfloat16, float16 or float32; by default what the weight was.

    Returns:
        A new tensor of q.shape on q's device. It carries no gradient.

    Raises:
        TypeError: dtypes. ValueError: sizes of packed, absmax or the nested tensors that do not fit q.shape and
            q.blocksize, or tensors on several devices.
    """
    return torch.ops.dora_ext.dequantize_nf4.default(*q.operands(dtype))
