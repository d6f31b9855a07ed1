"""linear_decode and linear_decode_nf4, one to eight tokens, against float64."""

import pytest
import torch

from dora_ext.ops import dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.cuda
ops = torch.ops.dora_ext
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# No result is further from the truth than one rounding of each of h and y (and of the codebook), measured by the terms
# of its sum: what cancels cannot be asked for.
WORST = {BF16: 2**-7, FP16: 2**-10}
# Of many results, by their norm: roundings of y, h and the codebook, against a weight that is itself rounded.
TYPICAL = {BF16: 2.6e-3, FP16: 3.5e-4}
# in, out, r: less than a step of a warp, ragged ends of rows and columns, one output, ranks of less and more than 32.
SHAPES = [(8, 1, 7), (200, 17, 1), (72, 33, 16), (1544, 16, 64), (2080, 130, 100)]
PACKED_SHAPES = [(64, 1, 7), (192, 17, 1), (128, 33, 16), (1600, 16, 64), (2112, 130, 100), (1088, 40, 8)]
# Whole boxes of 256 columns and rows that nearly fill the last round of 132 multiprocessors: Hopper has a kernel for
# these. One box more than a stage, one less than two; rows that end within sixteen.
RING_SHAPES = [(2048, 33, 16), (2304, 4000, 24), (3840, 1, 130), (6400, 4219, 8)]
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (BF16, FP16)]  # of x, and of A, B and bias


class Layer:
    scaling = 1.5

    def __init__(self, tokens, n_in, out, r, dtype=BF16, adapter=FP32, bias=True):
        def normal(*size, scale=1.0, to=dtype):
            return (torch.randn(size) * scale).to(to).cuda()

        self.x, self.weight = normal(tokens, n_in), normal(out, n_in, scale=n_in**-0.5)
        self.A, self.B = normal(r, n_in, scale=n_in**-0.5, to=adapter), normal(out, r, scale=0.3 * r**-0.5, to=adapter)
        self.gain = torch.rand(out).cuda() + 0.5
        self.bias = normal(out, to=adapter) if bias else None

    @property
    def rest(self):
        return (self.A, self.B, self.gain, self.bias, self.scaling)

    def dense(self):
        return ops.linear_decode(self.x, self.weight, *self.rest)

    def packed(self, q):
        return ops.linear_decode_nf4(self.x, *q.operands(), *self.rest)

    def check(self, result, weight):
        """`weight` is the truth."""
        (y, h), dtype = result, self.x.dtype
        x, W, A, B, gain = (t.double() for t in (self.x, weight, self.A, self.B, self.gain))
        bias = 0 if self.bias is None else self.bias.double()
        exact_h = x @ A.T
        exact = gain * (x @ W.T + self.scaling * exact_h @ B.T) + bias
        terms = gain * (x.abs() @ W.abs().T + self.scaling * exact_h.abs() @ B.abs().T) + abs(bias)
        assert y.dtype == h.dtype == dtype and y.shape == exact.shape and h.shape == exact_h.shape
        assert ((y.double() - exact).abs() <= WORST[dtype] * terms).all()
        assert ((h.double() - exact_h).abs() <= WORST[dtype] * (x.abs() @ A.abs().T)).all()
        if y.numel() >= 500:
            assert (y.double() - exact).norm() <= TYPICAL[dtype] * exact.norm()


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_values(shape, tokens):
    for i, (dtype, adapter) in enumerate(DTYPES):
        layer = Layer(tokens, *shape, dtype, adapter, bias=i != 2)
        layer.check(layer.dense(), layer.weight)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=str)
def test_packed_values(shape, tokens):
    for i, (dtype, adapter) in enumerate(DTYPES):
        layer = Layer(tokens, *shape, dtype, adapter, bias=i != 2)
        own = FP32 if i % 2 else dtype
        q = quantize_nf4(layer.weight.to(own), blocksize=[64, 128, 256, 4096][(tokens + i) % 4], double_quant=i != 3)
        layer.check(layer.packed(q), dequantize_nf4(q, dtype))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", RING_SHAPES, ids=str)
def test_values_in_the_ring(shape, tokens):
    for i, (dtype, adapter) in enumerate(DTYPES):
        layer = Layer(tokens, *shape, dtype, adapter, bias=i != 2)
        q = quantize_nf4(layer.weight, double_quant=(tokens + i) % 3 != 0)
        layer.check(layer.packed(q), dequantize_nf4(q))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("shape", [(4096, 4096, 16), (14336, 1024, 64), (53248, 100, 16)], ids=str)
def test_layers_of_models(shape, packed):
    for tokens, dtype in ((1, BF16), (8, BF16), (1, FP16), (5, FP16)):
        layer = Layer(tokens, *shape, dtype, dtype)
        if packed:
            q = quantize_nf4(layer.weight, double_quant=True)
            layer.check(layer.packed(q), dequantize_nf4(q))
        else:
            layer.check(layer.dense(), layer.weight)


def test_scales_of_any_size():
    """The scale goes onto sums in float32: no product of it with a code has to fit x's dtype."""
    layer = Layer(2, 256, 48, 4, BF16)
    for scale in (1e-30, 1e30):
        q = quantize_nf4(layer.weight.float() * scale)
        layer.B = torch.zeros_like(layer.B)
        layer.bias = None
        layer.check(layer.packed(q), dequantize_nf4(q))


COLUMNS = pytest.mark.parametrize("columns", [1024, 2048])  # one kernel and the other, where W is packed


@COLUMNS
def test_not_a_number_stays_with_its_token(columns):
    layer = Layer(3, columns, 40, 4)
    layer.x[1, 77] = float("nan")
    for y, h in (layer.dense(), layer.packed(quantize_nf4(layer.weight))):
        assert y[1].isnan().all() and h[1].isnan().all()
        assert y[[0, 2]].isfinite().all() and h[[0, 2]].isfinite().all()


@COLUMNS
def test_same_bits_twice_and_in_any_place(columns):
    layer = Layer(4, columns, 100, 16, FP16, FP16)
    q = quantize_nf4(layer.weight, double_quant=True)
    first = (*layer.dense(), *layer.packed(q))
    # Views that start anywhere, and columns of wider tensors.
    layer.x = torch.cat([layer.x.flatten()[:1], layer.x.flatten()])[1:].view_as(layer.x)
    layer.A = torch.cat([layer.A, layer.A], 1)[:, :columns]
    layer.gain = torch.stack([layer.gain, layer.gain], 1)[:, 0]
    for a, b in zip(first, (*layer.dense(), *layer.packed(q)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [16, 21, 1200])  # at 1200, eight tokens take more shared memory than the ring has
@COLUMNS
def test_a_token_does_not_see_the_others(columns, rank):
    layer = Layer(8, columns, 100, rank)
    q = quantize_nf4(layer.weight, double_quant=True)
    together = layer.dense()[0], layer.packed(q)[0]
    x = layer.x
    for i in range(8):
        layer.x = x[i : i + 1]
        assert torch.equal(layer.dense()[0], together[0][i : i + 1])
        assert torch.equal(layer.packed(q)[0], together[1][i : i + 1])


@COLUMNS
def test_graph_capture(columns):
    layer = Layer(1, columns, 100, 16)
    q = quantize_nf4(layer.weight, double_quant=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.dense(), layer.packed(q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (*layer.dense(), *layer.packed(q))
    for _ in range(3):
        layer.x.normal_()
        graph.replay()
        for a, b in zip(captured, (*layer.dense(), *layer.packed(q)), strict=True):
            assert torch.equal(a, b)


def test_opcheck():
    layer = Layer(2, 128, 24, 4)
    torch.library.opcheck(ops.linear_decode.default, (layer.x, layer.weight, *layer.rest))
    for nested in (False, True):
        q = quantize_nf4(layer.weight, double_quant=nested)
        torch.library.opcheck(ops.linear_decode_nf4.default, (layer.x, *q.operands(), *layer.rest))


def changed(**changes):
    layer = Layer(2, 128, 24, 4)
    for name, change in changes.items():
        setattr(layer, name, change(getattr(layer, name)))
    return layer


@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (ValueError, "1 to 8 tokens", {"x": lambda x: x[:1].repeat(9, 1)}),
        (ValueError, "1 to 8 tokens", {"x": lambda x: x[:0]}),
        (ValueError, "x: expected shape", {"x": lambda x: x[:, :120]}),
        (ValueError, "x: expected shape", {"x": lambda x: x[None]}),
        (TypeError, "x: expected the dtype of weight", {"x": lambda x: x.float()}),
        (ValueError, "decode_fits", {"x": lambda x: x.float(), "weight": lambda w: w.float()}),
        (ValueError, "contiguous weight", {"weight": lambda w: w.t().contiguous().t()}),
        (ValueError, "whole pieces", {n: lambda t: t[:, :124].contiguous() for n in ("x", "weight", "A")}),
        (ValueError, "gain", {"gain": lambda g: g[1:]}),
        (ValueError, "bias", {"bias": lambda b: b[1:]}),
        (ValueError, "lora_B", {"B": lambda b: b[1:]}),
    ],
)
def test_dense_refusals(error, said, changes):
    with pytest.raises(error, match=said):
        changed(**changes).dense()


def test_packed_refusals():
    def refused(layer, blocksize=64, own=BF16, **replaced):
        q = quantize_nf4(layer.weight.to(own), blocksize)._replace(**replaced)
        with pytest.raises(ValueError, match="linear_decode_nf4") as info:
            layer.packed(q)
        return str(info.value)

    assert "64 weights packed" in refused(Layer(2, 128, 24, 4), blocksize=32)
    assert "64 weights packed" in refused(Layer(2, 96, 24, 4))
    assert "1 to 8 tokens" in refused(Layer(9, 128, 24, 4))
    assert "got x of shape" in refused(Layer(2, 128, 24, 4, FP16), own=BF16)
    assert "absmax: expected" in refused(Layer(2, 128, 24, 4), absmax=torch.ones(3).cuda())
