"""NF4 against plain PyTorch: nearest codes, exact values, any layout, what is refused."""

import pytest
import torch
from nf4_cases import CODEBOOK, DTYPES, reference_dequantize, same_bits, shapes, weights

from dora_ext.ops import dequantize_nf4, quantize_nf4
from dora_ext.ops.nf4 import DYNAMIC_MAP


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


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_times_a_gain(device, dtype, double_quant):
    """What dequantize_nf4 gives, times a number for each row, rounded once more."""
    for shape in [(7,), (3, 128), (97, 131), (6, 3, 5), (130, 264), (40, 4096 + 8)]:
        q = quantize_nf4(weights("usual", shape, dtype, device), 64, double_quant)
        gain = torch.randn(shape[0], device=device)
        rows = gain.view(-1, *[1] * (len(shape) - 1))
        expected = (dequantize_nf4(q).float() * rows).to(dtype)
        assert same_bits(torch.ops.dora_ext.dequantize_nf4(*q.operands(), gain), expected), shape


def test_gain_of_rows_that_does_not_fit():
    q = quantize_nf4(torch.randn(4, 8))
    for gain, error, message in [
        (torch.ones(5), ValueError, "row_gain: expected"),
        (torch.ones(4, dtype=torch.float64), TypeError, "row_gain: expected float32"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.dora_ext.dequantize_nf4(*q.operands(), gain)


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
    for gain in ((), (torch.randn(9, device=device),)):
        torch.library.opcheck(ops.dequantize_nf4.default, (q.packed, q.absmax, 32, [9, 33], dtype, *nested, *gain))


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
