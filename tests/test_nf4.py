"""NF4 against bitsandbytes itself, where it is installed, and against plain PyTorch."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dora_ext.ops import NF4Tensor, dequantize_nf4, from_bitsandbytes, quantize_nf4
from dora_ext.ops.nf4 import CODEBOOK, DYNAMIC_MAP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.fixture
def bnb():
    """bitsandbytes; its slow paths go through torch.compile, which would take longer than the tests."""
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare bits with")
    with torch.compiler.set_stance("force_eager"):
        yield module


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


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_bit_equals_bitsandbytes(bnb, device, blocksize, dtype, double_quant):
    for shape in shapes(blocksize):
        for kind in ("usual", "tiny", "huge"):
            x = weights(kind, shape, dtype, device)
            packed, state = bnb.functional.quantize_4bit(
                x, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
            )
            q = quantize_nf4(x, blocksize, double_quant)
            assert same_bits(q.packed, packed.flatten()), (shape, kind)
            assert same_bits(q.absmax, state.absmax), (shape, kind)
            if double_quant:
                assert same_bits(q.nested_absmax, state.state2.absmax), (shape, kind)
                assert same_bits(q.nested_code, state.state2.code)
                assert same_bits(q.offset, state.offset), (shape, kind)
            read = from_bitsandbytes(packed, state)
            for out_dtype in DTYPES:
                state.dtype = out_dtype
                expected = bnb.functional.dequantize_4bit(packed, state)
                out = dequantize_nf4(read, out_dtype)
                assert out.shape == x.shape
                out, expected = out.flatten(), expected.flatten()
                if device == "cpu" and out_dtype == torch.float16:
                    # How bitsandbytes rounds to subnormals depends on the processor's instruction set.
                    subnormal = (out.abs() < 2**-14) & (expected.abs() < 2**-14)
                    assert (out[subnormal].float() - expected[subnormal].float()).abs().le(2**-24).all()
                    out, expected = out[~subnormal], expected[~subnormal]
                assert same_bits(out, expected), (shape, kind, out_dtype)


def test_not_finite_weights_as_in_bitsandbytes(bnb, device):
    x = torch.randn(8, 64)
    x[1, 3], x[2, 5], x[3, 0], x[4, 7], x[4, 8] = math.inf, -math.inf, math.nan, math.inf, math.nan
    packed, state = bnb.functional.quantize_4bit(x.to(device), blocksize=64, quant_type="nf4")
    q = quantize_nf4(x.to(device), 64)
    assert same_bits(q.packed, packed.flatten()) and same_bits(q.absmax, state.absmax)


def test_nested_scales_of_many_blocks_equal_bitsandbytes(bnb, device):
    for spread in (1.0, 1e-3, 30.0):
        absmax = torch.randn(100_003, device=device) * spread
        absmax[::1000] *= 50
        absmax[512:1024] = 0
        codes, state = bnb.functional.quantize_blockwise(absmax, blocksize=256)
        ours, nested = torch.ops.dora_ext.quantize_absmax(absmax, DYNAMIC_MAP.to(device), 256)
        assert same_bits(ours, codes) and same_bits(nested, state.absmax)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_reads_linear4bit(bnb, device, double_quant, storage):
    layer = bnb.nn.Linear4bit(
        128, 96, bias=False, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    ).to(device)
    expected = bnb.functional.dequantize_4bit(layer.weight.data.view(torch.uint8), layer.weight.quant_state)
    for source in (layer, layer.weight, SimpleModule(layer)):
        q = from_bitsandbytes(source)
        assert q.nested == double_quant and q.shape == (96, 128)
        assert same_bits(dequantize_nf4(q), expected)
    assert q.packed.data_ptr() == layer.weight.data_ptr()
    q = from_bitsandbytes(layer.weight.data.t(), layer.weight.quant_state)
    assert same_bits(dequantize_nf4(q), expected)


class SimpleModule(torch.nn.Module):
    """A layer whose parameter has lost its quant_state, as under FSDP."""

    def __init__(self, layer):
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
        self.quant_state = layer.weight.quant_state


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_nearest_codes_and_exact_values(device, blocksize, dtype, double_quant):
    for shape in (*shapes(blocksize), (0, 4)):
        x = weights("usual", shape, dtype, device)
        q = quantize_nf4(x, blocksize, double_quant)
        assert q.packed.numel() == (x.numel() + 1) // 2 and q.shape == x.shape
        for out_dtype in DTYPES:
            assert same_bits(dequantize_nf4(q, out_dtype).abs(), reference_dequantize(q, out_dtype).abs())
        if double_quant or x.numel() == 0:
            continue
        # No code would have been nearer to the weight.
        scale = q.absmax.repeat_interleave(blocksize)[: x.numel()].double()
        x = x.double().flatten()
        best = (x[:, None] - CODEBOOK.to(x) * scale[:, None]).abs().amin(1)
        error = (x - dequantize_nf4(q, torch.float32).double().flatten()).abs()
        assert (error <= best + 1e-6 * scale).all()
        expected = torch.nn.functional.pad(x.abs(), (0, -x.numel() % blocksize)).view(-1, blocksize).amax(1)
        # The last, shorter block of zeros has 1e-38 on the CPU, as in bitsandbytes.
        torch.testing.assert_close(q.absmax.double(), expected, rtol=1e-7, atol=2e-38)


def test_dequantised_weights_quantise_to_themselves(device):
    q = quantize_nf4(torch.randn(64, 100, device=device))
    again = quantize_nf4(dequantize_nf4(q))
    assert torch.equal(again.packed, q.packed) and torch.equal(again.absmax, q.absmax)


def test_nested_scales_cost_little_accuracy(device):
    x = torch.randn(512, 512, device=device)
    plain, nested = (dequantize_nf4(quantize_nf4(x, double_quant=d)) for d in (False, True))
    assert (nested - plain).norm() < 0.02 * x.norm()
    assert (plain - x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_zeros_stay_zeros(device, double_quant):
    for numel in (1, 64, 101):
        x = torch.zeros(numel, device=device)
        assert (dequantize_nf4(quantize_nf4(x, double_quant=double_quant)).abs() < 1e-37).all()


def test_any_memory_layout(device):
    x = torch.randn(33, 67, device=device)
    for view in (x.t(), x[1:, 3:], x.flatten()[1:], x[:, ::2], x[:1].expand(40, 67)):
        expected = quantize_nf4(view.clone(memory_format=torch.contiguous_format))
        q = quantize_nf4(view)
        assert torch.equal(q.packed, expected.packed) and torch.equal(q.absmax, expected.absmax)
        # Packed bytes anywhere in a file's buffer, strided scales.
        buffer = torch.zeros(q.packed.numel() + 1, dtype=torch.uint8, device=device)
        buffer[1:] = q.packed
        strided = torch.stack([q.absmax, q.absmax], 1)[:, 0]
        moved = q._replace(packed=buffer[1:], absmax=strided)
        assert same_bits(dequantize_nf4(moved), dequantize_nf4(expected))


def test_no_gradient_and_another_device(device):
    q = quantize_nf4(torch.randn(8, 8, requires_grad=True), double_quant=True).to(device)
    out = dequantize_nf4(q)
    assert not out.requires_grad and out.device.type == device
    assert torch.equal(out.cpu(), dequantize_nf4(q.to("cpu")))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_compiles_whole(device, double_quant):
    def there_and_back(x):
        q = quantize_nf4(x, 64, double_quant)
        return q, dequantize_nf4(q, torch.bfloat16)

    x = torch.randn(50, 33, device=device)
    compiled, expected = (f(x) for f in (torch.compile(there_and_back, fullgraph=True), there_and_back))
    assert same_bits(compiled[0].packed, expected[0].packed)
    # Inductor may sum the scales in another order for their mean: a nested scale can move by a step of its code.
    torch.testing.assert_close(compiled[1], expected[1], rtol=0 if not double_quant else 2e-2, atol=0)


def test_reading_a_state_compiles_whole(device):
    q = quantize_nf4(torch.randn(32, 64, device=device), double_quant=True)
    state = state_of(q)

    def product(x):
        return x @ dequantize_nf4(from_bitsandbytes(q.packed[:, None], state)).t()

    x = torch.randn(3, 64, device=device)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    ops = torch.ops.dora_ext
    x = torch.randn(9, 33, device=device).to(dtype)
    q = quantize_nf4(x, 32, double_quant=True)
    plain = quantize_nf4(x, 32)
    torch.library.opcheck(ops.quantize_nf4.default, (x, 32))
    torch.library.opcheck(ops.quantize_absmax.default, (plain.absmax, DYNAMIC_MAP.to(device), 256))
    torch.library.opcheck(ops.dequantize_nf4.default, (plain.packed, plain.absmax, 32, [9, 33], dtype))
    nested = (q.nested_absmax, q.nested_code, q.offset, q.nested_blocksize)
    torch.library.opcheck(ops.dequantize_nf4.default, (q.packed, q.absmax, 32, [9, 33], dtype, *nested))


@pytest.mark.cuda
def test_dequantisation_can_be_captured():
    q = quantize_nf4(torch.randn(256, 256, device="cuda"), double_quant=True)
    expected = dequantize_nf4(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequantize_nf4(q)
    out.zero_()
    graph.replay()
    assert same_bits(out, expected)


@pytest.mark.cuda
def test_more_than_2_to_the_31_weights():
    numel = 2**31 + 4096 + 77
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    x = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_()
    q = quantize_nf4(x)
    tail = 2**31 - 8192
    expected = quantize_nf4(x[tail:].clone())
    del x
    assert torch.equal(q.packed[tail // 2 :], expected.packed)
    assert same_bits(dequantize_nf4(q)[tail:], dequantize_nf4(expected))


def test_refuses_what_does_not_fit(device):
    x = torch.randn(8, 40, device=device)
    q = quantize_nf4(x, 32)
    n = quantize_nf4(x, 32, double_quant=True)
    for blocksize in (0, 16, 48, 8192, -64):
        with pytest.raises(ValueError, match="blocksize: expected a power of two from 32 to 4096"):
            quantize_nf4(x, blocksize)
        with pytest.raises(ValueError, match="blocksize: expected a power of two from 32 to 4096"):
            dequantize_nf4(q._replace(blocksize=blocksize))
    for dtype in (torch.int32, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="x: expected"):
            quantize_nf4(x.to(dtype))
    bad = [
        (q._replace(packed=q.packed[1:]), ValueError, "packed: expected 160 bytes"),
        (q._replace(packed=q.packed.int()), TypeError, "packed: expected uint8"),
        (q._replace(absmax=q.absmax[1:]), ValueError, "absmax: expected 10 values"),
        (q._replace(absmax=q.absmax.half()), TypeError, "absmax: expected float32"),
        (q._replace(shape=torch.Size([8, 41])), ValueError, "packed: expected 164 bytes"),
        (q._replace(dtype=torch.float64), TypeError, "dtype: expected bfloat16, float16 or float32"),
        (n._replace(absmax=q.absmax), TypeError, "absmax: expected uint8 with nested_absmax"),
        (n._replace(nested_absmax=n.nested_absmax.repeat(2)), ValueError, "nested_absmax: expected 1 float32"),
        (n._replace(nested_code=n.nested_code[1:]), ValueError, "nested_code: expected 256"),
        (n._replace(nested_code=None), ValueError, "nested_code: expected 256"),
        (n._replace(nested_blocksize=100), ValueError, "nested_blocksize: expected a power of two"),
        (n._replace(offset=n.offset.double()), ValueError, "offset: expected one float32 value"),
    ]
    for broken, error, message in bad:
        with pytest.raises(error, match=message):
            dequantize_nf4(broken)


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


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_reads_a_state_without_bitsandbytes(device, double_quant):
    q = quantize_nf4(torch.randn(8, 40, device=device), 32, double_quant)
    for packed in (q.packed[:, None], q.packed[:, None].t(), q.packed.view(torch.float16)[:, None]):
        read = from_bitsandbytes(packed, state_of(q))
        assert same_bits(dequantize_nf4(read), dequantize_nf4(q))


def test_refuses_corrupt_and_foreign_states(device):
    x = torch.randn(8, 40, device=device)
    q = quantize_nf4(x, 32)
    n = quantize_nf4(x, 32, double_quant=True)
    table = CODEBOOK.to(device, copy=True)
    table[3] += 1e-6
    inner = state_of(n).state2
    bad = [
        (x, None, ValueError, "it has no quant_state"),
        (3, None, TypeError, "expected a tensor or a Linear4bit, got int"),
        (torch.nn.Linear(4, 4), None, ValueError, "it has no quant_state"),
        (q.packed, state_of(q, quant_type="fp4"), ValueError, "expected quant_type nf4, got fp4"),
        (q.packed, state_of(q, code=table), ValueError, "not the table of NF4"),
        (q.packed, state_of(q, code=table[:8]), ValueError, "code: expected 16 values, got 8"),
        (q.packed, state_of(q, code=None), TypeError, "code: expected a float tensor"),
        (q.packed, state_of(q, packing_format_for_cpu=True), ValueError, "reordered"),
        (q.packed, state_of(q, dtype=torch.int8), TypeError, "dtype: expected a float dtype"),
        (q.packed, state_of(q, blocksize=48), ValueError, "blocksize: expected a power of two"),
        (q.packed, state_of(q, absmax=q.absmax[:-1]), ValueError, "absmax: expected 10 values .* got 9"),
        (q.packed, state_of(q, absmax=q.absmax.to("meta")), ValueError, "absmax: expected it on"),
        (q.packed, state_of(q, absmax=n.absmax), TypeError, "absmax: expected a float tensor"),
        (q.packed[:-1], state_of(q), ValueError, "weight: expected 160 bytes .* got 159"),
        (q.packed.to("meta"), state_of(q), ValueError, "on meta"),
        (n.packed, state_of(n, absmax=q.absmax), TypeError, "absmax: expected uint8 when nested"),
        (n.packed, state_of(n, offset=None), TypeError, "offset: expected a float tensor"),
        (n.packed, state_of(n, offset=n.offset.to("meta")), ValueError, "offset: expected it on"),
        (n.packed, state_of(n, absmax=n.absmax[1:]), ValueError, "absmax: expected 10 values"),
    ]
    for name, value, message in (
        ("absmax", n.nested_absmax.repeat(2), "state2.absmax: expected 1 values, got 2"),
        ("code", n.nested_code[:16], "state2.code: expected 256 values, got 16"),
        ("blocksize", 100, "state2.blocksize: expected a power of two"),
    ):
        broken = SimpleNamespace(**{**vars(inner), name: value})
        bad.append((n.packed, state_of(n, state2=broken), ValueError, message))
    for packed, state, error, message in bad:
        with pytest.raises(error, match=message):
            from_bitsandbytes(packed, state)
