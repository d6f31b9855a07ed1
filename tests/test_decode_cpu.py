"""torch.ops.dora_ext.linear_decode_nf4 on the CPU: a few tokens over packed weights."""

import pytest
import torch

import dora_ext
from dora_ext import dequantize_nf4, quantize_nf4, reference
from dora_ext.testing import relative_error

decode = torch.ops.dora_ext.linear_decode_nf4
# (out, in): rows that begin inside a byte, pieces of 512 columns and what is left of them, tiles of 8 rows likewise;
# whole steps of 128 columns, tiles of 16 rows and pieces of 16384 bytes of x.
SHAPES = [(1, 1), (5, 3), (40, 96), (97, 131), (64, 512), (70, 1100), (9, 2047), (1, 128), (37, 640), (18, 4224)]
# Against sums in float64: float32's own error, or one rounding of the result, of which this is the most. Many numbers
# have half of it together.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


class Case:
    def __init__(
        self, tokens, out, inn, r=4, dtype=torch.float32, blocksize=64, nested=True, bias=True, of_x=torch.float32
    ):
        self.q = quantize_nf4((torch.randn(out, inn) / inn**0.5).to(dtype), blocksize, nested)
        self.x, self.gain = torch.randn(tokens, inn).to(of_x), torch.rand(out) + 0.5
        self.A, self.B = torch.randn(r, inn) / inn**0.5, torch.randn(out, r) / r**0.5
        self.bias = torch.randn(out) if bias else None

    def decode(self, **changes):
        t = {**vars(self), **changes}
        return decode(t["x"], *t["q"].operands(), t["A"], t["B"], t["gain"], t["bias"], 1.5)

    def check(self):
        y, h = self.decode()
        dtype = self.x.dtype
        weight = dequantize_nf4(self.q, None if dtype == torch.float32 else dtype)  # rounded once
        x, W, A, B, gain = (t.double() for t in (self.x, weight, self.A, self.B, self.gain))
        exact = gain * (x @ W.T + 1.5 * (x @ A.T) @ B.T) + (0 if self.bias is None else self.bias.double())
        assert y.dtype == h.dtype == dtype and y.shape == exact.shape
        assert relative_error(h, x @ A.T) < TOLERANCE[dtype]
        assert relative_error(y, exact) < TOLERANCE[dtype] / (2 if y.numel() > 90 else 1)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, tokens):
    for nested in (False, True):
        Case(tokens, *shape, nested=nested, bias=nested).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_blocks_and_dtypes_of_weights(blocksize, dtype):
    """Values are rounded to the weight's dtype, then multiplied in float32."""
    for shape in ((70, 1100), (33, 131), (70, 1152), (33, 128)):
        Case(3, *shape, 17, dtype, blocksize).check()


@HALF
@pytest.mark.parametrize("tokens", range(1, 9))
def test_half_precision(half, tokens):
    for shape in ((97, 131), (37, 640), (18, 4224)):
        Case(tokens, *shape, dtype=half, of_x=half).check()
        Case(tokens, *shape, blocksize=128, nested=False, bias=False, of_x=half).check()


@HALF
def test_half_precision_is_summed_in_float32(half):
    """Where y is all cancellation, sums in half precision would be far off: here 2048 + 1 - 2048 + ... is exact."""
    x = torch.ones(1, 1024, dtype=half)
    x[0, ::4], x[0, 2::4] = 2048, -2048
    case = Case(1, 20, 1024, dtype=half, of_x=half, bias=False)
    case.x, case.q = x, quantize_nf4(torch.ones(20, 1024, dtype=half), 64)
    case.A.zero_()
    assert torch.equal(case.decode()[0], (512 * case.gain).to(half)[None])


def test_wider_adapters_and_views():
    case = Case(2, 40, 96)
    y = case.decode()[0]
    for changes in (
        {"A": case.A.double(), "B": case.B.double()},
        {"x": torch.cat([case.x, case.x], 1)[:, :96]},
        {"A": case.A.T.contiguous().T, "gain": case.gain.repeat_interleave(2)[::2]},
    ):
        assert relative_error(case.decode(**changes)[0], y) < 1e-6


def test_same_bits_on_any_number_of_threads():
    case, before = Case(5, 200, 700), torch.get_num_threads()
    y = case.decode()[0]
    try:
        torch.set_num_threads(1)
        assert torch.equal(case.decode()[0], y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_layer_comes_here_and_answers_the_same(tokens, dtype):
    linear = torch.nn.Linear(256, 80, dtype=dtype)
    layer = dora_ext.DoraLinear.from_base(linear, r=4, alpha=8, quantize="nf4")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(tokens, 2, 256, dtype=dtype)[:, 0].requires_grad_()
    weights = (dequantize_nf4(layer.base_layer.nf4), *layer._factors(), layer.magnitude)
    doubles = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = reference.linear(*doubles, layer.scaling, linear.bias.double())
    with torch.profiler.profile() as trace:
        y = layer(x)
    assert (tokens <= 8) == any("linear_decode_nf4" in e.name for e in trace.events())
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert y.dtype == dtype and relative_error(y, expected) < TOLERANCE[dtype]
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *layer._factors(), layer.magnitude], grad_y)
    exact = torch.autograd.grad(expected, [doubles[0], *doubles[2:]], grad_y.double())
    for ours, truth in zip(grads, exact, strict=True):
        assert relative_error(ours, truth) < 2 * TOLERANCE[dtype]


def test_refuses():
    case = Case(2, 40, 96)
    for changes in ({"x": torch.randn(9, 96)}, {"x": case.x.double()}, {"x": case.x[:0]}):
        with pytest.raises(ValueError, match="linear_decode_nf4: expected what decode_fits"):
            case.decode(**changes)
    with pytest.raises(ValueError, match="linear_decode_nf4: expected what decode_fits"):
        Case(2, 40, 96, dtype=torch.float16, of_x=torch.bfloat16).decode()  # W would be rounded twice
    with pytest.raises(ValueError, match=r"x: expected shape \(tokens, 96\)"):
        case.decode(x=torch.randn(2, 95))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_opcheck(dtype):
    case = Case(3, 40, 96, of_x=dtype)
    torch.library.opcheck(decode.default, (case.x, *case.q.operands(), case.A, case.B, case.gain, case.bias, 1.5))
