"""Reading what bitsandbytes has quantised to NF4, and saying what is wrong with it where something is."""

import weakref
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .nf4 import CODEBOOK, NF4Tensor


def from_bitsandbytes(weight: Any, quant_state: Any = None) -> NF4Tensor:
    """Reads a weight that bitsandbytes quantised, without copying it; bitsandbytes itself is not needed.

    A forward of Linear4bit in eval mode on a CPU with bfloat16 instructions reorders its weight for that CPU's product
    and rounds its scales to bfloat16: such a weight is put in order again, in a copy, and has the rounded scales.

    Args:
        weight: a `Linear4bit`, its `Params4bit`, or the packed tensor, in any storage dtype and as (n, 1) or
            transposed (1, n): the shape is the state's, (out, in).
        quant_state: its QuantState, by default the one that `weight` carries.

    The first call for a weight compares its code table with NF4's, which waits for the device: make it before graph
    capture. While torch.compile traces, the table is taken on trust.

    Raises:
        ValueError: not quantised yet, another data type than NF4 (FP4, another code table), sizes that do not fit,
            tensors on several devices or on meta, parts of the state missing.
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
    tracing = torch.compiler.is_compiling()
    data = weight.detach() if tracing else _plain(weight)
    reading = None if tracing else _Reading.of(data, state)
    if reading is not None:
        known = _readings.get(id(weight))
        if known is not None and known.weight() is weight and known.reading.same_as(reading):
            return NF4Tensor(_bytes_of(data), *known.rest)
    _require(state.quant_type == "nf4", f"quant_state: expected quant_type nf4, got {state.quant_type}")
    reordered = getattr(state, "packing_format_for_cpu", False)
    dtype = getattr(state, "original_dtype", state.dtype) if reordered else state.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"from_bitsandbytes: quant_state.dtype: expected a float dtype, got {dtype}")
    _require(isinstance(state.shape, (tuple, list)), f"quant_state.shape: expected the weight's, got {state.shape!r}")
    shape = torch.Size(state.shape)

    packed = _bytes_of(data)
    _require(packed.device.type != "meta", "weight: it is on meta and has no data")
    _check_table(state.code, packed.device)
    kind = type(state.absmax).__name__
    _require(isinstance(state.absmax, Tensor), f"quant_state.absmax: expected a tensor, got {kind}")
    if reordered:
        packed = restored_order(packed, shape)
    # Put back by bitsandbytes itself, a reordered state keeps its scales transposed.
    absmax, nested = (state.absmax.T if state.absmax.dim() == 2 else state.absmax).reshape(-1), {}
    inner = getattr(state, "state2", None)
    _require(inner is not None or not getattr(state, "nested", False), "quant_state.state2: missing, yet it is nested")
    if inner is not None:
        nested = {
            "nested_absmax": _vector("quant_state.state2.absmax", getattr(inner, "absmax", None), packed.device),
            "nested_code": _vector("quant_state.state2.code", getattr(inner, "code", None), packed.device, 256),
            "offset": _vector("quant_state.offset", state.offset, packed.device, 1).view(()),
            "nested_blocksize": getattr(inner, "blocksize", None),
        }
        if absmax.dtype != torch.uint8:
            raise TypeError(f"from_bitsandbytes: quant_state.absmax: expected uint8 when nested, got {absmax.dtype}")
    else:
        absmax = _vector("quant_state.absmax", absmax, packed.device)
    q = NF4Tensor(packed, absmax, state.blocksize, shape, dtype, **nested)
    _check_sizes(q)
    if reading is not None and _shares_memory(q, data, state):
        key = id(weight)
        alive = weakref.ref(weight, lambda _, forget=_readings.pop: forget(key, None))
        _readings[key] = _Known(alive, reading, q[1:])
    return q


def _plain(weight: Tensor) -> Tensor:
    """weight.detach(), a plain tensor: every look at a Params4bit goes through Python, and so does its own detach."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()


def _bytes_of(data: Tensor) -> Tensor:
    packed = data.reshape(-1)
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


class _Reading(NamedTuple):
    """What a weight was read from: all that its answer depends on but for the tensors' values, which it shares with
    them, or checks (`code`). A forward reads it anew, and would find the same objects and layout each time: then the
    answer is the same too, and looking is done in a third of the time. Where the bytes are does not matter: FSDP2
    gathers them into the same tensor at ever new addresses."""

    objects: tuple
    layout: tuple

    @classmethod
    def of(cls, data: Tensor, state: Any) -> "_Reading | None":
        """None where something is missing or reordered: such a state is looked at in full."""
        try:
            fields, inner = state.__dict__, state.state2
            if fields.get("packing_format_for_cpu"):
                return None
            # An object stays the same when its `data` is replaced.
            scales = [t.data_ptr() for t in _scales_of(state)]
            layout = (data.device, data.shape, data.stride(), data.dtype, state.code._version, scales)
            of_inner = () if inner is None else inner.__dict__.values()
        except AttributeError:
            return None
        return cls((state, *fields.values(), *of_inner), layout)

    def same_as(self, other: "_Reading") -> bool:
        same = self.layout == other.layout and len(self.objects) == len(other.objects)
        return same and all(map(is_, self.objects, other.objects))


class _Known(NamedTuple):
    weight: weakref.ref
    reading: _Reading
    rest: tuple  # of the NF4Tensor, not its bytes: they would keep their weight alive, and with it this entry


def _scales_of(state: Any) -> tuple[Tensor, ...]:
    inner = state.state2
    return (state.absmax,) if inner is None else (state.absmax, inner.absmax, inner.code, state.offset)


def _shares_memory(q: NF4Tensor, data: Tensor, state: Any) -> bool:
    """q has copied nothing: what is written into the weight or its state later shows in it."""
    read = [t for t in (q.packed, q.absmax, q.nested_absmax, q.nested_code, q.offset) if t is not None]
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(read, (data, *_scales_of(state)), strict=True))


_readings: dict[int, _Known] = {}  # by id of the weight: a WeakTensorKeyDictionary's look-up runs Python


def restored_order(packed: Tensor, shape: torch.Size) -> Tensor:
    """Undoes bitsandbytes' order for CPU products (uint8, any shape): of 32 rows the same two neighbouring weights are
    64 codes in a row, of which byte i holds the i-th in its low half and the one 32 further on in its high half."""
    _require(
        len(shape) == 2 and shape[0] % 32 == 0 and shape[1] % 2 == 0 and packed.numel() * 2 == shape.numel(),
        f"weight: reordered for the CPU, which shape {tuple(shape)} with {packed.numel()} bytes does not allow",
    )
    pairs = packed.reshape(-1, 32)
    codes = torch.cat([pairs & 15, pairs >> 4], 1).view(shape[0] // 32, shape[1] // 2, 32, 2).transpose(1, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).reshape(-1)


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
