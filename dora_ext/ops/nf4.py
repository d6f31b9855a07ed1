"""NF4, bitsandbytes' 4-bit weights, bit for bit: quantise, dequantise, and read what bitsandbytes has quantised."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
    return torch.ops.dora_ext.dequantize_nf4.default(
        q.packed,
        q.absmax,
        q.blocksize,
        q.shape,
        dtype or q.dtype,
        q.nested_absmax,
        q.nested_code,
        q.offset,
        q.nested_blocksize,
    )


def from_bitsandbytes(weight: Any, quant_state: Any = None) -> NF4Tensor:
    """Reads a weight that bitsandbytes quantised, without copying it; bitsandbytes itself is not needed.

    Args:
        weight: a `Linear4bit`, its `Params4bit`, or the packed tensor, in any storage dtype and as (n, 1) or
            transposed (1, n): the shape is the state's, (out, in).
        quant_state: its QuantState, by default the one that `weight` carries.

    The first call for a weight compares its code table with NF4's, which waits for the device: make it before graph
    capture. While torch.compile traces, the table is taken on trust.

    Raises:
        ValueError: not quantised yet, another data type than NF4 (FP4, another code table), sizes that do not fit,
            tensors on several devices or on meta, a layout reordered for bitsandbytes' own CPU product.
        TypeError: no tensor, or dtypes that bitsandbytes would not write.
    """
    if isinstance(weight, torch.nn.Module):
        module, weight = weight, weight.weight
        # FSDP replaces the parameter by a plain one; the layer still holds the state.
        quant_state = quant_state or getattr(module, "quant_state", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"from_bitsandbytes: weight: expected a tensor or a Linear4bit, got {type(weight).__name__}")
    state = getattr(weight, "quant_state", None) if quant_state is None else quant_state
    _require(state is not None, "weight: it has no quant_state; bitsandbytes quantises when a layer moves to a device")
    _require(state.quant_type == "nf4", f"quant_state: expected quant_type nf4, got {state.quant_type}")
    _require(
        not getattr(state, "packing_format_for_cpu", False),
        "weight: bitsandbytes has reordered it for its CPU product (a forward in eval mode does); load it again, "
        "and wrap it before that",
    )
    if state.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"from_bitsandbytes: quant_state.dtype: expected a float dtype, got {state.dtype}")

    packed = weight.detach().reshape(-1)
    packed = packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)
    _require(packed.device.type != "meta", "weight: it is on meta and has no data")
    _check_table(state.code, packed.device)
    absmax, nested = state.absmax.reshape(-1), {}
    if state.state2 is not None:
        inner = state.state2
        nested = {
            "nested_absmax": _vector("quant_state.state2.absmax", inner.absmax, packed.device),
            "nested_code": _vector("quant_state.state2.code", inner.code, packed.device, 256),
            "offset": _vector("quant_state.offset", state.offset, packed.device, 1).view(()),
            "nested_blocksize": inner.blocksize,
        }
        if absmax.dtype != torch.uint8:
            raise TypeError(f"from_bitsandbytes: quant_state.absmax: expected uint8 when nested, got {absmax.dtype}")
    else:
        absmax = _vector("quant_state.absmax", absmax, packed.device)
    q = NF4Tensor(packed, absmax, state.blocksize, torch.Size(state.shape), state.dtype, **nested)
    _check_sizes(q)
    return q


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"from_bitsandbytes: {message}")


def _vector(name: str, t: Any, device: torch.device, size: int | None = None) -> Tensor:
    """t as float32 (size,) on `device`. bitsandbytes widens scales of narrower dtypes in the same way."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"from_bitsandbytes: {name}: expected a float tensor, got {got}")
    _require(t.device == device, f"{name}: expected it on {device} like weight, got {t.device}")
    _require(size in (None, t.numel()), f"{name}: expected {size} values, got {t.numel()}")
    return t.detach().reshape(-1).float()


_checked_tables = WeakTensorKeyDictionary()  # code table -> its version when it was compared with NF4's


def _check_table(code: Any, device: torch.device) -> None:
    if torch.compiler.is_compiling():
        return
    if isinstance(code, Tensor) and _checked_tables.get(code) == code._version:
        return
    values = _vector("quant_state.code", code, device, 16)
    _require(torch.equal(values.cpu(), CODEBOOK), "quant_state.code: it is not the table of NF4")
    _checked_tables[code] = code._version


def _check_sizes(q: NF4Tensor) -> None:
    """What the op would refuse, refused when the state is read, with the state's names."""
    numel, blocksize = q.shape.numel(), q.blocksize
    _require(
        isinstance(blocksize, int) and 32 <= blocksize <= 4096 and blocksize & (blocksize - 1) == 0,
        f"quant_state.blocksize: expected a power of two from 32 to 4096, got {blocksize}",
    )
    device = q.packed.device
    _require(q.absmax.device == device, f"quant_state.absmax: expected it on {device}, got {q.absmax.device}")
    shape, size = tuple(q.shape), q.packed.numel()
    _require(size == (numel + 1) // 2, f"weight: expected {(numel + 1) // 2} bytes for shape {shape}, got {size}")
    blocks = -(-numel // blocksize)
    size = q.absmax.numel()
    _require(size == blocks, f"quant_state.absmax: expected {blocks} values for shape {shape}, got {size}")
    if q.nested:
        inner = q.nested_blocksize
        _require(
            isinstance(inner, int) and inner > 0 and inner & (inner - 1) == 0,
            f"quant_state.state2.blocksize: expected a power of two, got {inner}",
        )
        size, nested = q.nested_absmax.numel(), -(-blocks // inner)
        _require(size == nested, f"quant_state.state2.absmax: expected {nested} values, got {size}")
