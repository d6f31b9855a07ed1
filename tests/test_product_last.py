"""torch.ops.dora_ext.hopper_backward: a product that makes dA = P^T x last. Each case is an edge of dA: columns of
stretches, tokens of stages, ranks; the product itself has tests/test_product.py."""

import pytest
import torch
from test_product import (
    HALVES,
    expect_same_bits_twice,
    expect_same_bits_where_multiprocessors_are_held,
    hopper,
    matrix,
)

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import relative_error

backward, fits = torch.ops.dora_ext.hopper_backward, torch.ops.dora_ext.hopper_backward_fits
pytestmark = pytest.mark.cuda

# tokens, in, out, rank: wide tiles, whose last round is not full
SHAPES = [
    pytest.param((1100, 2056, 72, 16), id="edges of tokens and columns"),
    pytest.param((1100, 2056, 72, 8), id="half of a fragment's ranks"),
    pytest.param((1300, 2056, 136, 24), id="ranks of three eighths"),
    pytest.param((1152, 2048, 200, 32), id="whole stages, whole stretches"),
    pytest.param((1025, 2104, 520, 48), id="one token in the last stage"),
    pytest.param((1100, 2056, 264, 64), id="all ranks"),
    pytest.param((2048, 4096, 1024, 16), id="two rounds, four stretches a cluster"),
    pytest.param((4096, 4096, 520, 16), id="four rounds"),
]


class Case:
    def __init__(self, tokens, inner, out, r, dtype=torch.bfloat16, param_dtype=None):
        self.grad, self.weight = matrix(tokens, out, dtype), matrix(out, inner, dtype)
        self.P, self.x = matrix(tokens, r, dtype), matrix(tokens, inner, dtype)
        self.lora_A = torch.randn(r, inner, device="cuda").to(param_dtype or dtype)

    def operands(self):
        return self.grad, self.weight, self.P, self.lora_A, self.x

    def backward(self):
        return backward(*self.operands())

    def expect(self, dx, dA):
        dtype = self.x.dtype
        assert dx.dtype == dtype and dA.dtype == self.lora_A.dtype and dx.is_contiguous() and dA.is_contiguous()
        grad, weight, P, x = (t.double() for t in (self.grad, self.weight, self.P, self.x))
        straight = grad @ weight + P @ self.lora_A.to(dtype).double()
        assert relative_error(dx, straight) <= HALVES[dtype]
        assert relative_error(dA, P.T @ x) <= (2e-6 if dA.dtype == torch.float32 else HALVES[dtype])


@hopper
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", [False, True])
def test_values(shape, dtype, wide):
    case = Case(*shape, dtype, torch.float32 if wide else None)
    assert fits(case.grad, case.weight, case.P, case.x)
    torch.full((shape[3], shape[1]), float("nan"), dtype=case.lora_A.dtype, device="cuda")  # what dA may be made of
    case.expect(*case.backward())


@hopper
@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 16), (4096, 14336, 4096, 32), (16384, 4096, 4096, 16)], ids=str)
def test_values_of_a_real_layer(shape):
    case = Case(*shape, param_dtype=torch.float32)
    assert fits(case.grad, case.weight, case.P, case.x)
    case.expect(*case.backward())


@hopper
def test_same_bits_twice():
    case = Case(1100, 2056, 520, 24, param_dtype=torch.float32)
    expect_same_bits_twice(case.backward)


@hopper
def test_is_captured_and_replayed():
    case = Case(1100, 2056, 72, 16)
    case.backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.backward()
    case.x.mul_(-3)
    case.P.mul_(0.5)
    for _ in range(3):
        graph.replay()
    case.expect(*results)


@hopper
def test_when_another_kernel_holds_multiprocessors():
    """Clusters that come late find dA taken by those that are there."""
    expect_same_bits_where_multiprocessors_are_held(Case(4096, 4096, 520, 16).backward)


@hopper
def test_what_does_not_fit():
    case = Case(1100, 2056, 72, 16)
    grad, weight, P, lora_A, x = case.operands()
    assert not fits(grad, weight, P[:, :12], x) and not fits(grad, weight, matrix(1100, 72, P.dtype), x)
    assert not fits(grad[:300], weight, P[:300], x[:300])  # narrow tiles
    assert not fits(grad.float(), weight.float(), P.float(), x.float())
    assert not fits(grad, weight, P, x.t().contiguous().t())
    with pytest.raises(ValueError, match="hopper_backward: grad, weight, P, x: expected what hopper_backward_fits"):
        backward(grad[:300], weight, P[:300], lora_A, x[:300])
    with pytest.raises(ValueError, match="hopper_backward: x: expected shape"):
        backward(grad, weight, P, lora_A, x[:, :1024])
    with pytest.raises(TypeError, match="hopper_backward: x: expected the dtype of grad"):
        backward(grad, weight, P, lora_A, x.float())


@hopper
def test_opcheck():
    torch.library.opcheck(backward, Case(1100, 2056, 72, 16).operands())
