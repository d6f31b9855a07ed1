"""torch.ops.dora_ext.hopper_forward_norm: a product that makes its own gain first, the norms of W + s B A, with h or
without. Each case is an edge of the norms: units of 256 features, stages, ranks; h has tests/test_product_first.py."""

import pytest
import torch
from test_product import (
    HALVES,
    expect_same_bits_twice,
    expect_same_bits_where_multiprocessors_are_held,
    hopper,
)
from test_product_first import Case as Layer

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import relative_error

ops = torch.ops.dora_ext
forward, cached, fits = ops.hopper_forward_norm, ops.hopper_forward_norm_cached, ops.hopper_forward_norm_fits
pytestmark = pytest.mark.cuda

# tokens, in, out, rank: wide tiles in rounds of which the last leaves pairs of blocks idle. fmt: off
SHAPES = [
    pytest.param((4096, 72, 11008, 16), id="one stage"),
    pytest.param((4096, 136, 14336, 8), id="half of a fragment's ranks"),
    pytest.param((4090, 520, 14328, 16), id="edges of tokens, features and stages"),
    pytest.param((8192, 1032, 4088, 16), id="more stages than the ring has"),
    pytest.param((4096, 264, 14336, 24), id="ranks of three eighths"),
    pytest.param((3000, 1024, 14336, 64), id="all ranks"),
    pytest.param((4096, 1032, 3592, 64), id="all ranks, more stages than the ring has"),
    pytest.param((4096, 264, 14336, 64), id="without h, all ranks"),
    pytest.param((4096, 1024, 1000, 16), id="without h, few features"),
    pytest.param((66000, 72, 1000, 16), id="without h, of more rows than one launch makes"),
    pytest.param((4096, 1032, 4088, 64), id="norms launched before it"),
    pytest.param((600, 264, 520, 24), id="norms launched before it, narrow tiles"),
]


class Case(Layer):
    """Its gain is made, not given."""

    def operands(self):
        return self.x, self.weight, self.lora_A, self.lora_B, self.magnitude, self.bias, self.scaling

    def forward(self):
        return forward(*self.operands())

    def norms(self):
        A, B = (t.to(self.x.dtype).double() for t in (self.lora_A, self.lora_B))
        return torch.linalg.vector_norm(self.weight.double() + self.scaling * B @ A, dim=1)

    def expect(self, y, h, norm, gain):
        n = self.norms()
        self.gain = torch.where(n > 0, self.magnitude.double() / n, 0)
        assert norm.dtype == gain.dtype == torch.float32
        assert relative_error(norm, n) <= 1e-6 and relative_error(gain, self.gain) <= 1e-6
        super().expect(y, h)


@hopper
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_values(shape, dtype, scaling):
    case = Case(*shape, dtype=dtype, scaling=scaling)
    assert fits(case.x, case.weight, case.lora_A)
    torch.full((shape[2],), float("nan"), device="cuda")  # what the norms may be made of
    case.expect(*case.forward())


@hopper
@pytest.mark.parametrize("shape", [(4096, 4096, 14336, 16), (4096, 4096, 14336, 64), (4096, 4096, 1024, 16)], ids=str)
def test_values_of_a_real_layer(shape):
    """A wider adapter, no bias, and features whose W is nothing or exactly what the adapter takes away."""
    case = Case(*shape, bias=False, param_dtype=torch.float32)
    case.weight[::7] = 0
    case.lora_B[::14] = 0
    assert fits(case.x, case.weight, case.lora_A)
    y, h, norm, gain = case.forward()
    case.expect(y, h, norm, gain)
    assert not norm[::14].any() and not gain[::14].any() and not y[:, ::14].any()


@hopper
@pytest.mark.parametrize("shape", [(4096, 72, 14336, 16), (4096, 520, 4088, 24), (4096, 1024, 1024, 16)], ids=str)
def test_cache(shape):
    """What is kept is what counts while the fingerprint holds, and norm_cached has the same."""
    case = Case(*shape)
    keep = torch.zeros(shape[2], device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    first = cached(*case.operands(), *keep)
    case.expect(*first)
    assert keep[1][3] == 1 and torch.equal(keep[0], first[2])
    assert all(map(torch.equal, cached(*case.operands(), *keep), first)) and keep[1][3] == 1
    other = ops.norm_cached(*case.operands()[1:5], case.scaling, False, *keep)
    assert keep[1][3] == 1 and all(map(torch.equal, other, first[2:]))
    keep[0].mul_(2)  # nobody looks at W while the fingerprint holds
    twice = cached(*case.operands(), *keep)
    assert torch.equal(twice[2], 2 * first[2]) and keep[1][3] == 1
    case.lora_A[3, 5] += 1
    case.expect(*cached(*case.operands(), *keep))
    assert keep[1][3] == 2
    cached(*case.operands(), *keep, 1)  # another epoch
    assert keep[1][3] == 3


@hopper
@pytest.mark.parametrize("shape", [(4096, 136, 14336, 16), (4096, 264, 14336, 32), (4096, 1024, 1024, 16)], ids=str)
def test_same_bits_twice(shape):
    case = Case(*shape)
    expect_same_bits_twice(case.forward)


@hopper
def test_is_captured_and_replayed():
    case = Case(4096, 136, 11008, 16)
    keep = torch.zeros(11008, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    cached(*case.operands(), *keep)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cached(*case.operands(), *keep)
    case.x.mul_(-3)
    case.lora_B.mul_(0.5)
    for _ in range(3):
        graph.replay()
    case.expect(*results)
    assert keep[1][3] == 2


@hopper
def test_when_another_kernel_holds_multiprocessors():
    """Clusters that come late find norms taken by those that are there."""
    expect_same_bits_where_multiprocessors_are_held(Case(4096, 136, 11008, 16).forward)


@hopper
def test_what_does_not_fit():
    case = Case(4096, 136, 4096, 16)
    x, weight, lora_A, *rest = case.operands()
    assert fits(x, weight, lora_A)
    assert not fits(x, weight, lora_A[:12]) and not fits(x, weight, lora_A.repeat(5, 1))
    assert not fits(x[:0], weight, lora_A)
    padded = torch.zeros(4096, 144, dtype=x.dtype, device="cuda")[:, :136]
    assert not fits(x, padded, lora_A)
    with pytest.raises(ValueError, match="norm: x, weight, lora_A: expected what hopper_forward_norm_fits"):
        forward(x, padded, lora_A, *rest)
    with pytest.raises(ValueError, match="hopper_forward_norm: lora_A: expected shape"):
        forward(x, weight, lora_A[:, :32], *rest)
    keep = torch.zeros(4095, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="hopper_forward_norm_cached: cached"):
        cached(*case.operands(), *keep)


@hopper
def test_opcheck():
    case = Case(4096, 72, 4096, 16)
    torch.library.opcheck(forward, case.operands())
    keep = torch.zeros(4096, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.library.opcheck(cached.default, (*case.operands(), *keep), test_utils=("test_schema", "test_faketensor"))
