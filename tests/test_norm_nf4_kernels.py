"""The CUDA norms of packed weights by shape: each case is a path through norm_nf4.cuh or an edge of a tile."""

import pytest
import torch

from dora_ext.ops import NF4Tensor, dequantize_nf4, quantize_nf4
from dora_ext.ops.nf4 import CODEBOOK

pytestmark = pytest.mark.cuda

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = [*range(1, 35), 40, 47, 48, 63, 64, 65, 66, 80, 100, 127, 128, 129, 130]
# (out, in)
SHAPES = [
    pytest.param(1, 32, id="one piece"),
    pytest.param(16, 1024, id="exactly one tile of a strip"),
    pytest.param(33, 64, id="warps without columns"),
    pytest.param(100, 416, id="edges"),
    pytest.param(777, 2080, id="many rows, edges"),
    pytest.param(130, 14336, id="many strips"),
    pytest.param(40000, 96, id="more tiles than blocks may have"),
    pytest.param(97, 131, id="odd: rows begin inside a byte"),
    pytest.param(50, 72, id="rows off 16 bytes"),
    pytest.param(5, 3, id="less than a block"),
]


def problem(out, inn, r, dtype=torch.bfloat16, blocksize=64, nested=True, factors=None):
    weight = torch.randn(out, inn, device="cuda") / inn**0.5
    lora_A = (torch.randn(r, inn, device="cuda") / inn**0.5).to(factors or dtype)
    lora_B = (torch.randn(out, r, device="cuda") / (2 * r**0.5)).to(factors or dtype)
    return quantize_nf4(weight.to(dtype), blocksize, nested), lora_A, lora_B, torch.rand(out, device="cuda") + 0.5


def expect_norm(result, q: NF4Tensor, lora_A, lora_B, magnitude, scaling):
    """Against the float64 norm of the unpacked weight and of factors in its dtype."""
    lora_A, lora_B = lora_A.to(q.dtype).double(), lora_B.to(q.dtype).double()
    expected = (dequantize_nf4(q).double() + scaling * lora_B @ lora_A).norm(dim=1)
    for ours, truth in zip(result, (expected, magnitude.double() / expected), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - truth).norm() <= 1e-6 * truth.norm()
        assert ((ours.double() - truth).abs() <= 5e-6 * truth).all()


@pytest.mark.parametrize(("out", "inn"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(out, inn, dtype):
    for r in (1, 4, 16, 20, 32, 64, 70):
        arguments = problem(out, inn, r, dtype)
        expect_norm(torch.ops.dora_ext.norm_nf4(*arguments[0].operands(), *arguments[1:], 1.7), *arguments, 1.7)


@pytest.mark.parametrize("r", RANKS)
def test_ranks(r):
    for dtype, factors in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        arguments = problem(75, 160, r, dtype, factors=factors)
        expect_norm(torch.ops.dora_ext.norm_nf4(*arguments[0].operands(), *arguments[1:], 0.5), *arguments, 0.5)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(dtype, blocksize, nested):
    """Also where a block spans rows, and where scales of scales change within a row."""
    for shape in ((70, 96), (20, 4160)):
        for r in (8, 24, 64):
            arguments = problem(*shape, r, dtype, blocksize, nested)
            expect_norm(torch.ops.dora_ext.norm_nf4(*arguments[0].operands(), *arguments[1:], -1.25), *arguments, -1.25)


def test_weights_at_the_ends_of_their_dtype():
    """Rounded as dequantize_nf4 rounds, subnormal numbers too; squares of large ones stay finite."""
    for dtype, size in ((torch.float16, 1e-6), (torch.float16, 6e4), (torch.bfloat16, 1e-18), (torch.bfloat16, 1e17)):
        q, lora_A, lora_B, magnitude = problem(48, 256, 4, dtype)
        q = quantize_nf4((torch.randn(48, 256, device="cuda") * size).clamp(-size, size).to(dtype))
        arguments = (q, lora_A * 0, lora_B, magnitude)
        expect_norm(torch.ops.dora_ext.norm_nf4(*q.operands(), *arguments[1:], 1.0), *arguments, 1.0)


@pytest.mark.parametrize("scaling", [0.0, 1.0, -2.0, 0.0625, 3.0, 2.0**16, 2.0**-17])
def test_scalings(scaling):
    """A power of two may be multiplied into lora_A, if it is neither large nor small."""
    for dtype in (torch.bfloat16, torch.float16):
        for r in (7, 16, 32, 64):
            for nested in (False, True):
                arguments = problem(90, 1120, r, dtype, nested=nested)
                result = torch.ops.dora_ext.norm_nf4(*arguments[0].operands(), *arguments[1:], scaling)
                expect_norm(result, *arguments, scaling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [2, 20, 40])
def test_a_norm_that_almost_cancels_is_exact(dtype, r):
    """s B A is -W, save a hundredth: what |W|^2 + 2 s W.BA + s^2 |BA|^2 leaves of it has few digits."""
    values = CODEBOOK.to("cuda", dtype)[torch.randint(16, (256,), device="cuda")]
    values[::64] = 1
    size = torch.exp2(torch.randint(-3, 4, (48, 1), device="cuda").float()).to(dtype)
    q = quantize_nf4(size * values, 64, False)
    assert torch.equal(dequantize_nf4(q), size * values)
    lora_A, lora_B = torch.randn(r, 256, device="cuda") / 100, torch.randn(48, r, device="cuda") / r**0.5
    lora_A, lora_B = lora_A.to(dtype), size * lora_B.to(dtype)
    lora_A[0], lora_B[:, :1] = -values, size / 2
    norm, _ = torch.ops.dora_ext.norm_nf4(*q.operands(), lora_A, lora_B, torch.ones(48, device="cuda"), 2.0)
    truth = ((size * values).double() + 2 * lora_B.double() @ lora_A.double()).norm(dim=1)
    assert ((norm.double() - truth).abs() <= 1e-4 * truth).all()


def test_zero_rows():
    q, lora_A, lora_B, magnitude = problem(80, 96, 4, nested=False)
    weight = dequantize_nf4(q)
    weight[[0, 63, 64, 79]] = lora_B[[0, 63, 64, 79]] = 0
    q = quantize_nf4(weight, 32, False)
    norm, gain = torch.ops.dora_ext.norm_nf4(*q.operands(), lora_A, lora_B, magnitude, 2.0)
    assert norm[[0, 63, 64, 79]].eq(0).all() and gain[[0, 63, 64, 79]].eq(0).all()
    assert norm.gt(0).sum() == 76 and gain.isfinite().all()


def test_views():
    """Off 16 bytes and strided."""
    q, lora_A, lora_B, magnitude = problem(96, 160, 16)

    def off(t):
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)

    for arguments in (
        (q._replace(packed=off(q.packed), absmax=off(q.absmax)), lora_A, lora_B, magnitude),
        (q, off(lora_A), lora_B, magnitude),
        (q, lora_A, off(lora_B), magnitude),
        (q, lora_A.T.contiguous().T, lora_B.repeat_interleave(2, 1)[:, ::2], magnitude.repeat_interleave(2)[::2]),
    ):
        expect_norm(torch.ops.dora_ext.norm_nf4(*arguments[0].operands(), *arguments[1:], 1.3), *arguments, 1.3)


@pytest.mark.parametrize(("inn", "r"), [(1024, 16), (1024, 64), (1024, 100), (1000, 16)])
def test_same_bits_twice(inn, r):
    q, *others = problem(1000, inn, r)
    first = torch.ops.dora_ext.norm_nf4(*q.operands(), *others, 1.0)
    for _ in range(3):
        assert all(map(torch.equal, torch.ops.dora_ext.norm_nf4(*q.operands(), *others, 1.0), first))


@pytest.mark.parametrize("shape", [(96, 256), (97, 131)], ids=["packed", "unpacked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_sees_what_changed(shape, dtype):
    q, lora_A, lora_B, magnitude = arguments = problem(*shape, 8, dtype)
    cached = torch.full((shape[0],), float("nan"), device="cuda")
    fingerprint = torch.zeros(4, dtype=torch.int64, device="cuda")

    def computed(scaling=1.5, epoch=0) -> int:
        result = torch.ops.dora_ext.norm_nf4_cached(
            *q.operands(), lora_A, lora_B, magnitude, scaling, cached, fingerprint, epoch
        )
        expect_norm(result, *arguments, scaling)
        assert torch.equal(cached, result[0])
        assert fingerprint[1] == 0 and fingerprint[2] & 0xFFFFFFFF == 0, "not ready for the next call"
        return fingerprint[3].item()

    assert computed() == computed() == 1
    magnitude.mul_(2)  # no part of the norm: the cache holds, and the gain follows
    assert computed() == 1
    changes = [
        lambda: lora_A.data[-1, -1:].add_(1),
        lambda: lora_B.data.mul_(2),
        lambda: q.packed.data.bitwise_xor_(1),
        lambda: q.absmax.data.copy_(q.absmax.flip(0)),
        lambda: q.nested_absmax.data.mul_(2),
        lambda: q.offset.data.add_(0.1),
    ]
    for expected, change in enumerate(changes, start=2):
        change()
        assert computed() == computed() == expected
    assert computed(scaling=1.25) == 8
    assert computed(scaling=1.25, epoch=1) == computed(scaling=1.25, epoch=1) == 9


def test_cached_is_captured_and_replayed():
    """Nothing on the host decides: a replayed graph notices a changed adapter, and computes nothing otherwise."""
    q, lora_A, lora_B, magnitude = arguments = problem(256, 512, 16)
    cached, fingerprint = torch.zeros(256, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")

    def call():
        return torch.ops.dora_ext.norm_nf4_cached(*q.operands(), lora_A, lora_B, magnitude, 1.5, cached, fingerprint)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    assert fingerprint[3] == 1
    lora_A.mul_(3)
    for _ in range(3):
        graph.replay()
    assert fingerprint[3] == 2
    expect_norm(result, *arguments, 1.5)


def test_opcheck():
    q, lora_A, lora_B, magnitude = problem(48, 64, 4)
    ops = torch.ops.dora_ext
    torch.library.opcheck(ops.norm_nf4.default, (*q.operands(), lora_A, lora_B, magnitude, 1.0))
    state = (torch.zeros(48, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda"))
    torch.library.opcheck(ops.norm_nf4_cached.default, (*q.operands(), lora_A, lora_B, magnitude, 1.0, *state))


def test_refuses_other_devices():
    q, lora_A, lora_B, magnitude = problem(48, 64, 4)
    with pytest.raises(ValueError, match=r"norm_nf4: lora_A: .*cpu"):
        torch.ops.dora_ext.norm_nf4(*q.operands(), lora_A.cpu(), lora_B, magnitude, 1.0)
