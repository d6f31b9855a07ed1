"""torch.ops.dora_ext.linear_decode_nf4 on the CPU: a few tokens over packed weights, in float32."""

import pytest
import torch

import dora_ext
from dora_ext import dequantize_nf4, quantize_nf4, reference
from dora_ext.testing import relative_error

decode = torch.ops.dora_ext.linear_decode_nf4
# (out, in): rows that begin inside a byte, pieces of 512 columns and what is left of them, tiles of 8 rows likewise.
SHAPES = [(1, 1), (5, 3), (40, 96), (97, 131), (64, 512), (70, 1100), (9, 2047)]


class Case:
    def __init__(self, tokens, out, inn, r=4, dtype=torch.float32, blocksize=64, nested=True, bias=True):
        self.q = quantize_nf4((torch.randn(out, inn) / inn**0.5).to(dtype), blocksize, nested)
        self.x, self.gain = torch.randn(tokens, inn), torch.rand(out) + 0.5
        self.A, self.B = torch.randn(r, inn) / inn**0.5, torch.randn(out, r) / r**0.5
        self.bias = torch.randn(out) if bias else None

    def decode(self, **changes):
        t = {**vars(self), **changes}
        return decode(t["x"], *t["q"].operands(), t["A"], t["B"], t["gain"], t["bias"], 1.5)

    def check(self):
        y, h = self.decode()
        x, W, A, B, gain = (t.double() for t in (self.x, dequantize_nf4(self.q), self.A, self.B, self.gain))
        exact = gain * (x @ W.T + 1.5 * (x @ A.T) @ B.T) + (0 if self.bias is None else self.bias.double())
        assert y.dtype == h.dtype == torch.float32 and y.shape == exact.shape
        assert relative_error(y, exact) < 1e-6 and relative_error(h, x @ A.T) < 1e-6


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, tokens):
    for nested in (False, True):
        Case(tokens, *shape, nested=nested, bias=nested).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
def test_blocks_and_dtypes_of_weights(blocksize, dtype):
    """Values are rounded to the weight's dtype, then multiplied in float32."""
    for shape in ((70, 1100), (33, 131)):
        Case(3, *shape, 17, dtype, blocksize).check()


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


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_a_layer_comes_here_and_answers_the_same(tokens):
    linear = torch.nn.Linear(192, 80)
    layer = dora_ext.DoraLinear.from_base(linear, r=4, alpha=8, quantize="nf4").eval()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        x = torch.randn(tokens, 192)
        operands = (dequantize_nf4(layer.base_layer.nf4), *layer._factors(), layer.magnitude)
        expected = reference.linear(*(t.double() for t in (x, *operands)), layer.scaling, linear.bias.double())
        with torch.profiler.profile() as trace:
            y = layer(x)
        assert relative_error(y, expected) < 1e-6
    assert (tokens <= 8) == any("linear_decode_nf4" in e.name for e in trace.events())


def test_refuses():
    case = Case(2, 40, 96)
    for changes in ({"x": torch.randn(9, 96)}, {"x": case.x.double()}, {"x": case.x.bfloat16()}, {"x": case.x[:0]}):
        with pytest.raises(ValueError, match="linear_decode_nf4: expected what decode_fits"):
            case.decode(**changes)
    with pytest.raises(ValueError, match=r"x: expected shape \(tokens, 96\)"):
        case.decode(x=torch.randn(2, 95))


def test_opcheck():
    case = Case(3, 40, 96)
    torch.library.opcheck(decode.default, (case.x, *case.q.operands(), case.A, case.B, case.gain, case.bias, 1.5))
