"""torch.ops.dora_ext.hopper_forward: a product that makes its own tail, h = x A^T, first. Each case is an edge of h:
rows of tiles and stretches of them, stages, ranks; the product itself has tests/test_product.py."""

import pytest
import torch
from test_product import (
    HALVES,
    expect_same_bits_twice,
    expect_same_bits_where_multiprocessors_are_held,
    hopper,
)

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import adapter, relative_error

forward, fits = torch.ops.dora_ext.hopper_forward, torch.ops.dora_ext.hopper_forward_fits
pytestmark = pytest.mark.cuda

# tokens, in, out, rank
SHAPES = [
    pytest.param((1, 8, 8, 8), id="smallest"),
    pytest.param((128, 64, 64, 16), id="one block, one stage"),
    pytest.param((65, 200, 72, 16), id="edges everywhere"),
    pytest.param((300, 264, 520, 24), id="ranks of three eighths"),
    pytest.param((770, 1032, 104, 32), id="more stages than the ring has"),
    pytest.param((130, 72, 264, 32), id="one stage and a bit"),
    pytest.param((1100, 520, 1000, 32), id="two groups of tiles"),
    pytest.param((4100, 136, 1032, 16), id="three rounds"),
    pytest.param((4096, 72, 4096, 8), id="two rows of tiles in a stretch"),
    pytest.param((9000, 136, 72, 24), id="the last group not full"),
    pytest.param((14000, 136, 1032, 16), id="many rows"),
    pytest.param((300, 264, 520, 40), id="ranks of five eighths"),
    pytest.param((770, 1032, 104, 64), id="all ranks"),
]


class Case:
    def __init__(self, tokens, inner, out, r, dtype=torch.bfloat16, scaling=1.5, bias=True, **options):
        t = {k: v.detach() for k, v in adapter(out, inner, r, dtype=dtype, device="cuda", bias=bias, **options).items()}
        self.weight, self.lora_A, self.lora_B = t["weight"], t["lora_A"], t["lora_B"]
        self.magnitude, self.bias = t["magnitude"], t.get("bias")
        self.gain = torch.randn(out + 1, device="cuda")[1:]  # from 4 bytes off
        self.x, self.scaling = torch.randn(tokens, inner, device="cuda").to(dtype), scaling

    def operands(self):
        return self.x, self.weight, self.lora_A, self.lora_B, self.gain, self.bias, self.scaling

    def forward(self):
        return forward(*self.operands())

    def expect(self, y, h):
        dtype = self.x.dtype
        assert y.dtype == h.dtype == dtype and y.is_contiguous() and h.is_contiguous()
        few = 1 if h.numel() >= 1000 else 2
        x, A, B = (t.to(dtype).double() for t in (self.x, self.lora_A, self.lora_B))
        assert relative_error(h, x @ A.T) <= few * HALVES[dtype]
        straight = x @ self.weight.double().T + self.scaling * (x @ A.T) @ B.T
        expected = self.gain.double() * straight + (0 if self.bias is None else self.bias.double())
        assert relative_error(y, expected) <= 1.5 * few * HALVES[dtype]


@hopper
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_values(shape, dtype, scaling):
    case = Case(*shape, dtype=dtype, scaling=scaling)
    assert fits(case.x, case.weight, case.lora_A)
    torch.full((shape[0], shape[3]), float("nan"), dtype=dtype, device="cuda")  # what h may be made of
    case.expect(*case.forward())


@hopper
@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 16), (3000, 1024, 14336, 32)], ids=str)
def test_values_of_a_real_layer(shape):
    """Wide tiles in several rounds; a wider adapter, no bias."""
    case = Case(*shape, bias=False, param_dtype=torch.float32)
    assert fits(case.x, case.weight, case.lora_A)
    case.expect(*case.forward())


@hopper
@pytest.mark.parametrize("shape", [(4096, 520, 4096, 16), (600, 1000, 520, 24), (300, 4096, 264, 32)], ids=str)
def test_same_bits_twice(shape):
    case = Case(*shape)
    expect_same_bits_twice(case.forward)


@hopper
def test_is_captured_and_replayed():
    case = Case(600, 1000, 520, 24)
    case.forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.forward()
    case.x.mul_(-3)
    case.lora_B.mul_(0.5)
    for _ in range(3):
        graph.replay()
    case.expect(*results)


@hopper
def test_captured_graphs_and_streams_beside_one_another():
    """Replays of two graphs and products of two streams at once: none counts with another's zeros."""
    cases = [Case(1000, 520, 2056, 16), Case(700, 1032, 1032, 32)]
    expected, graphs, results = [case.forward() for case in cases], [], []
    for case in cases:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(case.forward())
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    eager = [[], []]
    for _ in range(20):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                graphs[i].replay()
            with torch.cuda.stream(streams[2 + i]):
                eager[i].append(cases[i].forward())
    torch.cuda.synchronize()
    for i in range(2):
        for got in (results[i], *eager[i]):
            assert all(map(torch.equal, got, expected[i]))


@hopper
def test_when_another_kernel_holds_multiprocessors():
    """Clusters that come late find h taken by those that are there."""
    expect_same_bits_where_multiprocessors_are_held(Case(4096, 136, 1032, 16).forward)


@hopper
def test_what_does_not_fit():
    case = Case(64, 64, 64, 16)
    x, weight, lora_A, *rest = case.operands()
    assert not fits(x, weight, lora_A[:12]) and not fits(x, weight, lora_A.repeat(5, 1))
    assert not fits(x.float(), weight.float(), lora_A.float())
    assert not fits(x[:0], weight, lora_A)
    assert not fits(x, weight[:, :60], lora_A)
    whole_rounds = torch.randn(256 * 66, 64, device="cuda", dtype=x.dtype)  # no cluster would be idle
    assert not fits(whole_rounds, weight, lora_A) or torch.cuda.get_device_properties(0).multi_processor_count != 132
    with pytest.raises(ValueError, match="hopper_forward: x, weight, lora_A: expected what hopper_forward_fits"):
        forward(x, weight.t(), lora_A, *rest)
    with pytest.raises(ValueError, match="hopper_forward: lora_A: expected shape"):
        forward(x, weight, lora_A[:, :32], *rest)


@hopper
def test_opcheck():
    torch.library.opcheck(forward, Case(65, 200, 72, 16).operands())
