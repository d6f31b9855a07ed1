"""The CUDA norm kernels by shape: each case is a path through csrc/cuda/norm.cuh or an edge of a tile."""

import pytest
import torch

from dora_ext import reference
from dora_ext.testing import adapter

pytestmark = pytest.mark.cuda

# (out, in, r)
SHAPES = [
    pytest.param(1, 1, 1, id="one number"),
    pytest.param(7, 13, 3, id="odd: rows off 16 bytes"),
    pytest.param(16, 512, 16, id="exactly one tile of a strip"),
    pytest.param(72, 136, 5, id="tile edges, odd rows of lora_B"),
    pytest.param(200, 648, 24, id="rank 32"),
    pytest.param(136, 264, 17, id="smallest rank 32, padded"),
    pytest.param(136, 264, 33, id="smallest rank 64, padded"),
    pytest.param(136, 264, 65, id="smallest high rank"),
    pytest.param(129, 392, 100, id="odd features"),
    pytest.param(264, 400, 520, id="lora_B does not fit in shared memory"),
    pytest.param(130, 77, 70, id="odd high rank"),
    pytest.param(1024, 4096, 16, id="few features: many splits"),
    pytest.param(4096, 1024, 64, id="many features"),
    pytest.param(512, 640, 384, id="rank 384"),
    pytest.param(3, 14336, 8, id="long rows"),
    pytest.param(70000, 64, 4, id="more tiles than blocks may have"),
]
# Half precision, past norm_rows.cuh: on Hopper, or everywhere
HIGH_RANKS = [
    pytest.param(17000, 520, 24, id="rank 24 of a large weight"),
    pytest.param(2100, 2056, 64, id="rank 64 of a large weight"),
    pytest.param(257, 520, 72, id="a chunk of 8 ranks at the end"),
    pytest.param(129, 1032, 100, id="lora_B's rows off 16 bytes"),
    pytest.param(8, 264, 104, id="fewer features than a tile"),
    pytest.param(384, 776, 384, id="rank 384"),
    pytest.param(300, 256, 512, id="rank 512"),
    pytest.param(130, 520, 584, id="more than stays in Hopper's shared memory"),
    pytest.param(17000, 520, 136, id="blocks that walk on to other rows"),
    pytest.param(200, 40000, 80, id="rows of many blocks"),
]
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def kernel_inputs(out, inn, r, dtype=torch.bfloat16, transposed=False, **options):
    t = adapter(out, inn, r, dtype=dtype, device="cuda", transposed=transposed, bias=False, **options)
    return [t[name].detach() for name in ("weight", "lora_A", "lora_B", "magnitude")]


def expect_norm(result, tensors, scaling, transposed=False, bound=1e-6):
    """Against the float64 norm of the same numbers, relative to |W| + |s B A|, whose sum may nearly cancel."""
    weight, lora_A, lora_B, magnitude = (t.double() for t in tensors)
    expected = reference.weight_norm(weight, lora_A, lora_B, scaling, transposed)
    scale = weight.norm(dim=0 if transposed else 1) + scaling * (lora_B @ lora_A).norm(dim=1)
    gain = reference.gain(magnitude, expected)
    norm_error, gain_error = (result[0].double() - expected).abs(), (result[1].double() - gain).abs()
    assert norm_error.norm() <= bound * scale.norm()
    assert (norm_error <= 5 * bound * scale).all()
    assert (gain_error * expected <= 5 * bound * scale * gain.abs()).all()


@pytest.mark.parametrize(("out", "inn", "r"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_shapes(out, inn, r, transposed, dtype):
    tensors = kernel_inputs(out, inn, r, dtype, transposed)
    result = torch.ops.dora_ext.norm(*tensors, 1.7, transposed)
    assert {t.dtype for t in result} == {torch.float64 if dtype == torch.float64 else torch.float32}
    expect_norm(result, tensors, 1.7, transposed, BOUNDS[dtype])


@pytest.mark.parametrize(("out", "inn", "r"), HIGH_RANKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_high_ranks(out, inn, r, transposed, dtype):
    tensors = kernel_inputs(out, inn, r, dtype, transposed)
    first = torch.ops.dora_ext.norm(*tensors, 0.7, transposed)
    expect_norm(first, tensors, 0.7, transposed)
    assert all(map(torch.equal, torch.ops.dora_ext.norm(*tensors, 0.7, transposed), first))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("r", [4, 100, 104])
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_rows(dtype, r, transposed):
    tensors = kernel_inputs(80, 96, r, dtype, transposed, zero_rows=(0, 63, 64, 79))
    norm, gain = torch.ops.dora_ext.norm(*tensors, 2.0, transposed)
    assert norm[[0, 63, 64, 79]].eq(0).all() and gain[[0, 63, 64, 79]].eq(0).all()
    assert norm.gt(0).sum() == 76 and gain.isfinite().all()


@pytest.mark.parametrize("r", [8, 96])
def test_float16_squares_and_products_do_not_overflow(r):
    """300 squared is past float16's 65504, and so is the product of lora_B and lora_A."""
    tensors = [torch.full(shape, 300.0, dtype=torch.float16, device="cuda") for shape in [(72, 4096), (r, 4096)]]
    tensors += [torch.full((72, r), 300.0, dtype=torch.float16, device="cuda"), torch.ones(72, device="cuda")]
    expect_norm(torch.ops.dora_ext.norm(*tensors, 0.5, False), tensors, 0.5)


@pytest.mark.parametrize("magnitude", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_magnitude_of_another_dtype(magnitude, dtype):
    tensors = kernel_inputs(40, 64, 8, dtype)
    tensors[3] = tensors[3].to(magnitude)
    expect_norm(torch.ops.dora_ext.norm(*tensors, 1.0, False), tensors, 1.0)


@pytest.mark.parametrize("r", [16, 96])
@pytest.mark.parametrize("transposed", [False, True])
def test_views(transposed, r):
    """Off 16 bytes, strided, expanded, and the other layout seen through .T."""
    weight, lora_A, lora_B, magnitude = kernel_inputs(96, 160, r, transposed=transposed)
    views = {
        "off 16 bytes": (torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight), lora_A, lora_B),
        "lora_A off 16 bytes": (
            weight,
            torch.cat([lora_A.flatten()[:1], lora_A.flatten()])[1:].view_as(lora_A),
            lora_B,
        ),
        "lora_B off 16 bytes": (
            weight,
            lora_A,
            torch.cat([lora_B.flatten()[:1], lora_B.flatten()])[1:].view_as(lora_B),
        ),
        "strided": (weight.repeat_interleave(2, 1)[:, ::2], lora_A.repeat_interleave(2, 0)[::2], lora_B),
        "expanded": (weight[:1].expand_as(weight), lora_A, lora_B[:, :1].expand_as(lora_B)),
        "columns first": (weight.T.contiguous().T, lora_A.T.contiguous().T, lora_B.T.contiguous().T),
    }
    for what, tensors in views.items():
        tensors = [*tensors, magnitude]
        assert not tensors[0].is_contiguous() or any(t.data_ptr() % 16 for t in tensors), what
        expect_norm(torch.ops.dora_ext.norm(*tensors, 1.3, transposed), tensors, 1.3, transposed)


@pytest.mark.parametrize(("vocab", "dim"), [(50257, 64), (1003, 768), (32064, 136)])
def test_vocabularies(vocab, dim):
    """Column norms over many rows; a vocabulary of odd size pads lora_A."""
    tensors = kernel_inputs(dim, vocab, 16, transposed=True)
    expect_norm(torch.ops.dora_ext.norm(*tensors, 0.5, True), tensors, 0.5, True)


def test_empty():
    empty = torch.ops.dora_ext.norm(*kernel_inputs(0, 16, 4), 1.0, False)
    assert empty[0].shape == empty[1].shape == (0,)
    weight = torch.empty(5, 0, device="cuda")
    norm, gain = torch.ops.dora_ext.norm(
        weight, weight.new_empty(3, 0), weight.new_ones(5, 3), weight.new_ones(5), 1.0, False
    )
    assert norm.eq(0).all() and gain.eq(0).all()


@pytest.mark.parametrize("r", [16, 384])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_same_bits_twice(r, dtype):
    tensors = kernel_inputs(1000, 1024, r, dtype)
    first = torch.ops.dora_ext.norm(*tensors, 1.0, False)
    for _ in range(3):
        assert all(map(torch.equal, torch.ops.dora_ext.norm(*tensors, 1.0, False), first))


class Cache:
    """norm_cached with its two buffers, checked against the reference at every call."""

    def __init__(self, tensors, transposed):
        accumulate = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        self.tensors, self.transposed = tensors, transposed
        self.cached = torch.full((tensors[2].shape[0],), float("nan"), dtype=accumulate, device="cuda")
        self.fingerprint = torch.zeros(4, dtype=torch.int64, device="cuda")

    def computed(self, scaling=1.5, epoch=0) -> int:
        state = (self.cached, self.fingerprint, epoch)
        result = torch.ops.dora_ext.norm_cached(*self.tensors, scaling, self.transposed, *state)
        expect_norm(result, self.tensors, scaling, self.transposed)
        fresh = torch.ops.dora_ext.norm(*self.tensors, scaling, self.transposed)
        assert all(map(torch.equal, result, fresh)) and torch.equal(self.cached, fresh[0])
        assert self.fingerprint[1] == 0 and self.fingerprint[2] & 0xFFFFFFFF == 0, "not ready for the next call"
        return self.fingerprint[3].item()


@pytest.mark.parametrize(("out", "inn", "r"), [(1, 1, 1), (7, 13, 3), (136, 264, 16), (264, 392, 100), (264, 392, 104)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cached_sees_what_changed(out, inn, r, transposed, dtype):
    weight, lora_A, lora_B, magnitude = tensors = kernel_inputs(out, inn, r, dtype, transposed)
    cache = Cache(tensors, transposed)
    assert cache.computed() == 1
    assert cache.computed() == 1
    magnitude.mul_(2)  # no part of the norm: the cache holds, and the gain follows
    assert cache.computed() == 1
    # Raw writes, which bump no version.
    for expected, change in enumerate(
        [
            lambda: lora_A.data[-1, -1:].add_(1),
            lambda: lora_B.data[:1, :1].add_(1),
            lambda: lora_A.data.mul_(-1),
            lambda: weight.data[weight.shape[0] // 2].add_(1),
            lambda: weight.data[:, weight.shape[1] // 2].add_(1),
        ],
        start=2,
    ):
        change()
        assert cache.computed() == expected
        assert cache.computed() == expected
    assert cache.computed(scaling=1.25) == 7
    assert cache.computed(scaling=1.25, epoch=1) == 8  # the caller knows of a change that cannot be seen
    assert cache.computed(scaling=1.25, epoch=1) == 8
    cache.fingerprint.zero_()  # how a cache is invalidated
    assert cache.computed(scaling=1.25) == 1


def test_cached_is_captured_and_replayed():
    """Nothing on the host decides: a replayed graph notices a changed adapter."""
    tensors = kernel_inputs(256, 512, 16)
    cache = Cache(tensors, transposed=False)
    assert cache.computed() == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.ops.dora_ext.norm_cached(*tensors, 1.5, False, cache.cached, cache.fingerprint)
    graph.replay()
    assert cache.fingerprint[3] == 1
    tensors[1].mul_(3)
    graph.replay()
    assert cache.fingerprint[3] == 2
    expect_norm(result, tensors, 1.5)


def test_runs_on_the_current_stream():
    tensors = kernel_inputs(512, 1024, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        tensors[0].mul_(2)
        result = torch.ops.dora_ext.norm(*tensors, 1.0, False)
    torch.cuda.current_stream().wait_stream(stream)
    expect_norm(result, tensors, 1.0)
