"""Factors kept in float32 beside a base in half precision: cast once in a forward, whoever needs them."""

import pytest
import torch
from test_layer_products import choose  # noqa: F401

from dora_ext.norm_cache import NormCache
from dora_ext.ops import dora_linear, dora_linear_nf4, quantize_nf4

pytestmark = pytest.mark.cuda

DTYPES = [torch.bfloat16, torch.float16]
# What the norms and h are made by differs among them; the last two decode, and have a rank of no vectors.
SHAPES = [(300, 264, 520, 24), (512, 4096, 4096, 16), (512, 1024, 3584, 64), (2048, 512, 256, 8), (64, 768, 512, 96),
          (3, 512, 512, 16), (40, 128, 192, 5)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_factors(dtype):
    op = torch.ops.dora_ext.cast_factors
    for shape_A, shape_B in [((4, 8), (3, 4)), ((16, 4096), (520, 16)), ((0, 8), (4, 0)), ((1, 4), (4096, 64))]:
        A, B = torch.randn(shape_A, device="cuda"), torch.randn(shape_B, device="cuda")
        A.view(-1)[:3] = torch.tensor([float("inf"), float("nan"), 7e4])[: A.numel()]
        cast = op(A, B, dtype)
        for got, wide in zip(cast, (A, B), strict=True):
            torch.testing.assert_close(got, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.library.opcheck(op.default, (torch.randn(8, 16, device="cuda"), torch.randn(4, 8, device="cuda"), dtype))
    A = torch.randn(8, 8, device="cuda")
    for wrong in (A.t(), A.double(), A.to(dtype), A[:1, :3], A.view(-1)[1:61]):
        with pytest.raises(ValueError, match="lora_A, lora_B: expected contiguous float32"):
            op(wrong, A, dtype)
    with pytest.raises(ValueError, match="dtype bfloat16 or float16"):
        op(A, A, torch.float32)


def factors(n_in, out, r):
    A, B = torch.randn(r, n_in, device="cuda") / n_in**0.5, torch.randn(out, r, device="cuda") / r**0.5
    return A, B, torch.rand(out, device="cuda") + 0.5


@pytest.mark.parametrize("which", ["auto", "library", "hopper"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_with_factors_cast_before(dtype, shape, which, choose):  # noqa: F811
    """With the norms kept and not, and again after a change that leaves no trace on the host."""
    tokens, n_in, out, r = shape
    x, W = (torch.randn(n, n_in, device="cuda").to(dtype) for n in (tokens, out))
    A, B, m = factors(n_in, out, r)
    choose(which)
    kept, kept_of_cast = NormCache(), NormCache()
    for _ in range(2):
        cast = A.to(dtype), B.to(dtype)
        for first, second in ((None, None), (kept, kept_of_cast), (kept, kept_of_cast)):
            y = dora_linear(x, W, A, B, m, scaling=0.7, cache=first)
            if tokens > 8:  # the decoding kernels add up fp32 factors as they are
                assert torch.equal(y, dora_linear(x, W, *cast, m, scaling=0.7, cache=second))
        assert kept.computed == kept_of_cast.computed or tokens <= 8
        A.data.mul_(1.5)
        B.data[-1].neg_()
    assert kept.computed == 2


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_over_nf4(dtype, tokens):
    n_in, out, r = 512, 768, 16
    packed = quantize_nf4(torch.randn(out, n_in, device="cuda").to(dtype))
    A, B, m = factors(n_in, out, r)
    x, kept = torch.randn(tokens, n_in, device="cuda").to(dtype), NormCache()
    for _ in range(2):
        expected = dora_linear_nf4(x, packed, A.to(dtype), B.to(dtype), m, scaling=2.0)
        for cache in (None, kept, kept):
            y = dora_linear_nf4(x, packed, A, B, m, scaling=2.0, cache=cache)
            assert torch.equal(y, expected) or tokens <= 8
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        A.data.mul_(1.5)
    assert kept.computed == 2
