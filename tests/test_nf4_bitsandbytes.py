"""NF4 against bitsandbytes itself, where it is installed; reading its layers and states."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from nf4_cases import BLOCKSIZES, DTYPES, reference_dequantize, same_bits, shapes, state_of, weights

from dora_ext.ops import dequantize_nf4, from_bitsandbytes, nf4_bitsandbytes, quantize_nf4
from dora_ext.ops.nf4 import CODEBOOK, DYNAMIC_MAP


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
                if device == "cpu" and out_dtype == torch.bfloat16:
                    # AVX-512's conversion takes subnormal numbers for zeros.
                    flushed = (expected == 0) & (out.abs() <= torch.finfo(torch.bfloat16).tiny)
                    out, expected = out[~flushed], expected[~flushed]
                assert same_bits(out, expected), (shape, kind, out_dtype)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_reads_what_bitsandbytes_reorders_for_its_cpu_product(bnb, double_quant, storage):
    """Also after bitsandbytes has put it back, as saving does: its scales are transposed from then on."""
    layer = bnb.nn.Linear4bit(
        256, 64, bias=False, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    ).to("cpu")
    before = dequantize_nf4(from_bitsandbytes(layer))
    codes = from_bitsandbytes(layer).packed.clone()
    functional = bnb.functional
    data, state = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    q = from_bitsandbytes(data, state)
    assert torch.equal(q.packed, codes) and q.dtype == torch.float32 and not q.nested
    expected = reference_dequantize(q, torch.float32)
    assert same_bits(dequantize_nf4(q), expected)
    assert (expected - before).norm() < 2**-8 * before.norm()  # its scales in bfloat16
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    again = dequantize_nf4(from_bitsandbytes(data, state))
    assert (again - before).norm() < (2e-2 if double_quant else 2**-8) * before.norm()


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


def test_reading_a_state_compiles_whole(device):
    q = quantize_nf4(torch.randn(32, 64, device=device), double_quant=True)
    state = state_of(q)

    def product(x):
        return x @ dequantize_nf4(from_bitsandbytes(q.packed[:, None], state)).t()

    x = torch.randn(3, 64, device=device)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_reads_a_state_without_bitsandbytes(device, double_quant):
    q = quantize_nf4(torch.randn(8, 40, device=device), 32, double_quant)
    for packed in (q.packed[:, None], q.packed[:, None].t(), q.packed.view(torch.float16)[:, None]):
        read = from_bitsandbytes(packed, state_of(q))
        assert same_bits(dequantize_nf4(read), dequantize_nf4(q))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16], ids=str)
def test_sees_every_change_of_a_state_it_has_read_before(device, storage, double_quant):
    q, other = (quantize_nf4(torch.randn(8, 40, device=device), 32, double_quant) for _ in range(2))
    weight = torch.nn.Parameter(q.packed.clone().view(storage)[:, None], requires_grad=False)
    state = state_of(q)

    def expect(values):
        for _ in range(2):
            assert same_bits(dequantize_nf4(from_bitsandbytes(weight, state)), values)

    expect(dequantize_nf4(q))
    absmax = from_bitsandbytes(weight, state).absmax
    assert from_bitsandbytes(weight, state).absmax is absmax  # not looked at anew
    weight.data = other.packed.clone().view(storage)[:, None]
    expect(dequantize_nf4(q._replace(packed=other.packed)))
    # Nor for bytes that come to lie elsewhere, as FSDP2's do in every forward.
    assert from_bitsandbytes(weight, state).absmax is absmax
    weight.data = weight.data.repeat(1, 2)[:, :1]  # which can only be copied, and each time again
    expect(dequantize_nf4(q._replace(packed=other.packed)))
    weight.data.copy_(q.packed.view(storage)[:, None])
    expect(dequantize_nf4(q))
    state.absmax = other.absmax
    expect(dequantize_nf4(q._replace(absmax=other.absmax)))
    state.absmax.data = q.absmax.clone()
    expect(dequantize_nf4(q))
    state.absmax.copy_(other.absmax)
    expect(dequantize_nf4(q._replace(absmax=other.absmax)))
    state.absmax = q.absmax
    expect(dequantize_nf4(q))
    state.dtype = torch.float16
    expect(dequantize_nf4(q, torch.float16))
    state.code[3] += 1e-6
    with pytest.raises(ValueError, match="not the table of NF4"):
        from_bitsandbytes(weight, state)


def test_remembers_no_weight_that_is_gone():
    q = quantize_nf4(torch.randn(8, 40))
    weight = torch.nn.Parameter(q.packed[:, None], requires_grad=False)
    from_bitsandbytes(weight, state_of(q))
    alive, before = weakref.ref(weight), len(nf4_bitsandbytes._readings)
    del weight
    gc.collect()
    assert alive() is None and len(nf4_bitsandbytes._readings) == before - 1


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
        (q.packed, state_of(q, packing_format_for_cpu=True), ValueError, "reordered for the CPU, which shape"),
        (q.packed, state_of(q, quant_type="int4"), ValueError, "expected quant_type nf4, got int4"),
        (q.packed, state_of(q, shape=None), ValueError, "quant_state.shape: expected the weight's, got None"),
        (q.packed, state_of(q, shape=torch.Size([8, 42])), ValueError, "weight: expected 168 bytes .* got 160"),
        (q.packed, state_of(q, absmax=None), ValueError, "quant_state.absmax: expected a tensor, got NoneType"),
        (q.packed, state_of(q, nested=True), ValueError, "quant_state.state2: missing"),
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
        (
            n.packed,
            state_of(n, state2=SimpleNamespace()),
            TypeError,
            "state2.absmax: expected a float tensor, got None",
        ),
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
