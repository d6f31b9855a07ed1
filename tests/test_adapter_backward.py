"""adapter_backward: all that linear_backward sees of the output's gradient, against float64. On CUDA the shapes with a
rank of 8 to 64 in half precision take the one-pass kernel, the others the composition."""

import pytest
import torch

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import DTYPES, TOLERANCE, assert_close

adapter_backward = torch.ops.dora_ext.adapter_backward
NAMES = ("G", "P", "grad_B", "grad_magnitude", "grad_bias")

# tokens, out, r: one of everything, around tiles of 32 x 128, several splits and groups, ranks that need padding, and
# more of them than a pass takes.
ONE_PASS = [(1, 8, 8), (32, 128, 16), (33, 136, 16), (100, 264, 24), (31, 120, 32), (700, 1160, 8), (2100, 520, 32)]
ONE_PASS += [(33, 136, 40), (40, 64, 48), (700, 1160, 56), (2100, 520, 64)]
# On Hopper, in tiles of 64 x 256: blocks that go on in the next group of features, and groups that they share unevenly.
ONE_PASS += [(3270, 1544, 64), (3270, 1544, 16), (40, 35080, 24)]
COMPOSED = [(40, 57, 16), (40, 64, 5), (40, 64, 72), (0, 16, 8)]  # what that kernel doesn't take


class Case:
    def __init__(self, tokens, out, r, dtype, device, wide=None, bias=True):
        def rand(*size, dtype=dtype, scale=1.0):
            return (torch.randn(*size, dtype=torch.float64) * scale).to(device, dtype)

        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self.scaling = 0.75
        self.grad, self.h = rand(tokens, out), rand(tokens, r)
        self.lora_B = rand(out, r, dtype=wide or dtype, scale=r**-0.5)
        self.norm = torch.rand(out, dtype=accumulate, device=device) + 0.5
        self.gain = torch.rand(out, dtype=accumulate, device=device) + 0.25
        self.bias = rand(out, dtype=wide or dtype) if bias else None
        u = torch.randn(tokens, out, dtype=torch.float64, device=device)
        self.y = (self.gain.double() * u + (0 if self.bias is None else self.bias.double())).to(dtype)

    def args(self, mask=31, saved=True):
        y = self.y if saved else None
        return (self.grad, y, self.h, self.lora_B, self.norm, self.gain, self.bias, self.scaling, mask)

    def reference(self):
        grad, h, B, n, g = (t.double() for t in (self.grad, self.h, self.lora_B, self.norm, self.gain))
        G = g * grad
        u = (self.y.double() - (0 if self.bias is None else self.bias.double())) / g
        P, grad_B = self.scaling * G @ B, self.scaling * G.T @ h
        return G, P, grad_B, (grad * u).sum(0) / n, grad.sum(0)

    def check(self, results, tolerance, mask=31):
        for i, (name, got, expected) in enumerate(zip(NAMES, results, self.reference(), strict=True)):
            if mask >> i & 1:
                assert got.shape == expected.shape, name
                assert_close(got, expected, tolerance, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ONE_PASS, ids=str)
def test_against_float64(device, shape, dtype):
    case = Case(*shape, dtype, device)
    case.check(adapter_backward(*case.args()), TOLERANCE[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ONE_PASS, ids=str)
def test_without_what_only_hopper_has(shape, dtype):
    case = Case(*shape, dtype, "cuda")
    before = torch.ops.dora_ext.choose_products("library")
    try:
        results = adapter_backward(*case.args())
    finally:
        torch.ops.dora_ext.choose_products(before)
    case.check(results, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "shape, dtype",
    [(s, d) for s in COMPOSED for d in DTYPES] + [(s, d) for s in ONE_PASS for d in (torch.float32, torch.float64)],
    ids=str,
)
def test_composed_against_float64(device, shape, dtype):
    case = Case(*shape, dtype, device)
    case.check(adapter_backward(*case.args()), TOLERANCE[dtype])


@pytest.mark.parametrize("magnitude_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(70, 264, 16), (70, 264, 64), (40, 57, 16)], ids=str)
def test_the_magnitudes_gradient_in_another_dtype(device, shape, magnitude_dtype):
    case = Case(*shape, torch.bfloat16, device)
    wide, narrow = (adapter_backward(*case.args(), d)[3] for d in (None, magnitude_dtype))
    assert wide.dtype == torch.float32 and narrow.dtype == magnitude_dtype
    assert torch.equal(narrow, wide.to(magnitude_dtype))  # rounded once


@pytest.mark.cuda
def test_in_one_pass():
    fits = torch.ops.dora_ext.adapter_backward_in_one_pass
    for shapes, expected in ((ONE_PASS, True), (COMPOSED, False)):
        for shape in shapes:
            case = Case(*shape, torch.bfloat16, "cuda")
            assert fits(case.grad, case.y, case.h, case.lora_B) == expected
            assert not fits(case.grad.float(), None, case.h.float(), case.lora_B)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_parameters(device, dtype, bias):
    case = Case(70, 264, 16, dtype, device, wide=torch.float32, bias=bias)
    results = adapter_backward(*case.args())
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    case.check(results, TOLERANCE[dtype])


@pytest.mark.parametrize("saved", [True, False], ids=["y", "no y"])
@pytest.mark.parametrize("mask", range(32))
@pytest.mark.parametrize("r", [16, 40])
def test_what_the_mask_asks_for(device, mask, saved, r):
    case = Case(40, 136, r, torch.bfloat16, device)
    if not saved and mask & 8:
        with pytest.raises(ValueError, match="y: expected a tensor, as mask asks for grad_magnitude"):
            adapter_backward(*case.args(mask, saved))
        return
    case.check(adapter_backward(*case.args(mask, saved)), TOLERANCE[torch.bfloat16], mask)


def test_the_same_bits_twice_and_in_every_split(device):
    case = Case(1000, 1032, 16, torch.bfloat16, device)
    for first, second in zip(adapter_backward(*case.args()), adapter_backward(*case.args()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(device, dtype):
    case = Case(33, 136, 16, dtype, device)
    for mask in (31, 2):
        torch.library.opcheck(adapter_backward, case.args(mask))


def test_refuses(device):
    case = Case(8, 16, 8, torch.bfloat16, device)
    good = case.args()

    def with_argument(i, value):
        return (*good[:i], value, *good[i + 1 :])

    for i, value, kind, message in (
        (0, case.grad[0], ValueError, "grad: expected 2 dimensions"),
        (1, case.y[:3], ValueError, "y: expected shape"),
        (1, case.y.float(), TypeError, "y: expected the dtype of grad"),
        (2, case.h[:, :4], ValueError, "h: expected shape"),
        (2, case.h.float(), TypeError, "h: expected the dtype of grad"),
        (3, case.lora_B[:8], ValueError, "lora_B: expected shape"),
        (4, case.norm[:8], ValueError, "norm: expected shape"),
        (5, case.gain[:8], ValueError, "gain: expected shape"),
        (6, case.bias[:8], ValueError, "bias: expected shape"),
        (7, float("nan"), ValueError, "scaling: expected a finite number"),
        (9, torch.int32, TypeError, "magnitude_dtype: expected bfloat16, float16, float32 or float64, got Int"),
    ):
        with pytest.raises(kind, match=message):
            adapter_backward(*with_argument(i, value))


@pytest.mark.cuda
def test_composed_of_views_that_are_not_contiguous():
    case = Case(64, 136, 16, torch.bfloat16, "cuda")
    case.grad = case.grad.t().contiguous().t()
    case.h = torch.stack((case.h, case.h), -1)[..., 0]
    case.check(adapter_backward(*case.args()), TOLERANCE[torch.bfloat16])
