"""The norm from packed NF4 weights: values, memory, cache, what is refused."""

import pytest
import torch
from nf4_cases import BLOCKSIZES, DTYPES, norm_tolerance

from bench.measure import cpu_peak_mib
from dora_ext import reference
from dora_ext.norm_cache import NormCache
from dora_ext.ops import NF4Tensor, dequantize_nf4, norm_and_gain_nf4, quantize_nf4, weight_norm_nf4
from dora_ext.testing import assert_close

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])


def problem(out, n_in, r=4, *, dtype=torch.float32, blocksize=64, double_quant=True, device="cpu", zero_rows=()):
    weight = torch.randn(out, n_in) / n_in**0.5
    lora_A, lora_B = torch.randn(r, n_in) / n_in**0.5, torch.randn(out, r) / (2 * r**0.5)
    for row in zero_rows:
        weight[row] = lora_B[row] = 0
    q = quantize_nf4(weight.to(device, dtype), blocksize, double_quant)
    return q, lora_A.to(device), lora_B.to(device), (torch.rand(out) + 0.5).to(device)


def truth(q: NF4Tensor, lora_A, lora_B, scaling):
    return reference.weight_norm(*(t.double() for t in (dequantize_nf4(q), lora_A, lora_B)), scaling)


# Odd columns begin rows inside a byte, 131 inside a block; 4099 columns take two pieces, 97 rows seven.
SHAPES = [(97, 131), (5, 3), (1, 1), (33, 4099), (64, 256), (2, 9000)]


@NESTED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(device, shape, dtype, double_quant):
    for r in (1, 4, 70):
        q, A, B, m = problem(*shape, r, dtype=dtype, double_quant=double_quant, device=device)
        norm, gain = norm_and_gain_nf4(q, A, B, m, scaling=1.5)
        expected = truth(q, A, B, 1.5)
        tolerance = norm_tolerance(device, dtype)
        assert norm.dtype == gain.dtype == torch.float32
        assert_close(norm, expected, tolerance, "norm")
        assert_close(gain, m.double() / expected, tolerance, "gain")


@NESTED
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_any_block_size(device, blocksize, double_quant):
    q, A, B, _ = problem(48, 176, blocksize=blocksize, double_quant=double_quant, device=device)
    assert_close(weight_norm_nf4(q, A, B, scaling=0.7), truth(q, A, B, 0.7), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_norm_of_the_unpacked_weight(device, dtype):
    from dora_ext.ops import norm_and_gain

    q, A, B, m = problem(80, 320, dtype=dtype, device=device)
    A, B = A.to(dtype).float(), B.to(dtype).float()
    for ours, dense in zip(
        norm_and_gain_nf4(q, A, B, m, scaling=2.0), norm_and_gain(dequantize_nf4(q), A, B, m, scaling=2.0), strict=True
    ):
        assert_close(ours, dense, 1e-6)


def test_zero_rows_wide_factors_and_any_layout(device):
    q, A, B, m = problem(40, 96, zero_rows=(3, 7), double_quant=False, device=device)
    norm, gain = norm_and_gain_nf4(q, A, B, m, scaling=1.0)
    assert (norm[[3, 7]] == 0).all() and (gain[[3, 7]] == 0).all() and norm.count_nonzero() == 38
    strided = torch.stack([B, B], 2)[..., 0]
    again = weight_norm_nf4(q, A.T.contiguous().T, strided, scaling=1.0)
    assert_close(again, norm, 1e-7)
    assert_close(weight_norm_nf4(q, A.double(), B.double(), scaling=1.0), norm, 1e-6)


def test_makes_nothing_of_the_weights_size():
    q, A, B, _ = problem(2048, 1024, r=8)
    mib = cpu_peak_mib(lambda: weight_norm_nf4(q, A, B, scaling=1.0), lambda: None)
    assert mib < 0.5 < q.shape.numel() / 2**21  # a bfloat16 copy would be 4 MiB


def test_same_bits_twice_and_by_any_number_of_threads():
    q, A, B, _ = problem(130, 5000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = weight_norm_nf4(q, A, B, scaling=1.0)
        torch.set_num_threads(2)
        assert torch.equal(weight_norm_nf4(q, A, B, scaling=1.0), alone)
    finally:
        torch.set_num_threads(threads)


@NESTED
def test_cache_reuses_and_notices(device, double_quant):
    q, A, B, m = problem(48, 128, double_quant=double_quant, device=device)
    cache = NormCache()

    def check(computed: int) -> None:
        norm, gain = norm_and_gain_nf4(q, A, B, m, scaling=1.0, cache=cache)
        assert_close(norm, truth(q, A, B, 1.0), 1e-6)
        assert_close(gain, m.double() / truth(q, A, B, 1.0), 1e-6)
        assert cache.computed == computed

    check(1)
    check(1)
    q = NF4Tensor(*(t.view(t.shape) if isinstance(t, torch.Tensor) else t for t in q))  # as read anew from a layer
    check(1)
    m.mul_(2)
    check(1)
    other = quantize_nf4(torch.randn(48, 128, device=device), double_quant=double_quant)
    changes = [
        lambda: A.add_(0.1),
        lambda: B.data.mul_(2),  # no version tells of these three
        lambda: q.packed.data.copy_(other.packed),
        lambda: q.absmax.data.copy_(other.absmax),
        lambda: q.packed.bitwise_xor_(1),
        lambda: q.absmax.copy_(q.absmax.flip(0)),
    ]
    if double_quant:
        changes += [lambda: q.nested_absmax.data.mul_(2), lambda: q.offset.data.add_(0.5)]
    for number, change in enumerate(changes):
        change()
        check(2 + number)
        check(2 + number)


def test_cache_of_other_bytes_at_the_same_place(device):
    """Freed and allocated anew at one address: never taken for the old weight."""
    cache = NormCache()
    for _ in range(4):
        q, A, B, m = problem(16, 64, device=device)
        norm, _ = norm_and_gain_nf4(q, A, B, m, scaling=1.0, cache=cache)
        assert_close(norm, truth(q, A, B, 1.0), 1e-6)
        del q, A, B


@NESTED
def test_opcheck(double_quant):
    q, A, B, m = problem(9, 34, double_quant=double_quant)
    ops = torch.ops.dora_ext
    torch.library.opcheck(ops.norm_nf4.default, (*q.operands(), A, B, m, 1.0))
    state = (torch.zeros(9), torch.zeros(4, dtype=torch.int64))
    torch.library.opcheck(ops.norm_nf4_cached.default, (*q.operands(), A, B, m, 1.0, *state))


def test_refuses_what_does_not_fit():
    q, A, B, m = problem(8, 40, blocksize=32)
    flat = q._replace(shape=torch.Size([320]))
    bad = [
        ((flat, A, B, m), ValueError, r"norm_nf4: shape: expected \(out, in\), got \[320\]"),
        ((q, A[:, 1:], B, m), ValueError, r"lora_A: expected shape \(r, 40\).* got \[4, 39\]"),
        ((q, A, B[1:], m), ValueError, r"lora_B: expected shape \(8, 4\).* got \[7, 4\]"),
        ((q, A.int(), B, m), TypeError, "lora_A: expected bfloat16, float16, float32 or float64, got Int"),
        ((q, A, B, m[1:]), ValueError, r"magnitude: expected shape \[8\], got \[7\]"),
        ((q._replace(packed=q.packed[1:]), A, B, m), ValueError, "norm_nf4: packed: expected 160 bytes"),
        ((q._replace(absmax=q.absmax[1:]), A, B, m), ValueError, "norm_nf4: absmax: expected 10 values"),
        ((q._replace(nested_code=None), A, B, m), ValueError, "norm_nf4: nested_code: expected 256"),
        ((q._replace(dtype=torch.float64), A, B, m), TypeError, "norm_nf4: dtype: expected bfloat16, float16"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            norm_and_gain_nf4(*arguments, scaling=1.0)
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        norm_and_gain_nf4(q, A, B, m, scaling=float("nan"))


def test_compiles_whole():
    q, A, B, m = problem(24, 64)
    compiled = torch.compile(lambda a, b: norm_and_gain_nf4(q, a, b, m, scaling=1.0), fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(A, B), norm_and_gain_nf4(q, A, B, m, scaling=1.0), strict=True):
        assert torch.equal(ours, expected)
