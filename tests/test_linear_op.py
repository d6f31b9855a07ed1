"""torch.ops.dora_ext.linear_forward and linear_backward as they are, without autograd around them, against
dora_ext.reference in float64."""

from functools import partial

import pytest
import torch

import dora_ext  # noqa: F401, registers the ops
from dora_ext import reference
from dora_ext.testing import DTYPES, TOLERANCE, adapter, assert_close, relative_error

forward = torch.ops.dora_ext.linear_forward
backward = torch.ops.dora_ext.linear_backward
NAMES = ("x", "lora_A", "lora_B", "magnitude", "bias")

# tokens, in, out, r: around the edges of tiles and vectors, one token, a rank above the vectors' width.
SHAPES = [(33, 40, 56, 4), (1, 37, 29, 3), (70, 200, 130, 70), (5, 513, 257, 16), (130, 64, 96, 16)]


def rounded(t, dtype):
    return t.detach().to(dtype).double().cpu()


class Case:
    """One layer: what goes into the ops, and the reference's output and gradients in float64."""

    def __init__(self, tokens, in_features, out_features, r, device, dtype, *, scaling=1.5, batch=(), **options):
        self.scaling, self.transposed = scaling, options.get("transposed", False)
        tensors = adapter(out_features, in_features, r, dtype=dtype, device=device, **options)
        self.layer = {k: t.detach() for k, t in tensors.items()}
        self.layer.setdefault("bias", None)
        self.x = torch.randn(*batch, tokens, in_features, dtype=torch.float64).to(dtype).to(device)
        self.grad_y = torch.randn(*batch, tokens, out_features, dtype=torch.float64).to(dtype).to(device)

    def forward(self, **given):
        t = self.layer
        args = (self.x, t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], t["bias"])
        return forward(*args, given.get("norm"), given.get("gain"), self.scaling, self.transposed)

    def backward(self, y, h, norm, gain, mask=31, grad_y=None):
        t = self.layer
        if t["bias"] is None:
            mask &= 15
        rest = (t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], t["bias"], norm, gain)
        grad_y = self.grad_y if grad_y is None else grad_y
        return backward(grad_y, y, self.x, h, *rest, self.scaling, self.transposed, mask)

    def reference(self, grad_y=None):
        dtype = self.x.dtype
        t = {k: None if v is None else rounded(v, v.dtype) for k, v in self.layer.items()}
        for name in ("lora_A", "lora_B"):  # the op casts them to x's dtype
            t[name] = rounded(self.layer[name], dtype)
        leaves = {"x": rounded(self.x, dtype), **{k: t[k] for k in NAMES[1:] if t[k] is not None}}
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        args = (leaves["x"], t["weight"], leaves["lora_A"], leaves["lora_B"], leaves["magnitude"])
        y = reference.linear(*args, self.scaling, leaves.get("bias"), self.transposed)
        grad_y = self.grad_y if grad_y is None else grad_y
        grads = torch.autograd.grad(y, list(leaves.values()), grad_y.double().cpu())
        return y, dict(zip(leaves, grads, strict=True))

    def check(self, results, expected, tolerance, mask=31):
        for i, (name, got) in enumerate(zip(NAMES, results, strict=True)):
            if not mask >> i & 1 or (name == "bias" and self.layer["bias"] is None):
                assert got.numel() == 0, name
                continue
            like = self.x if name == "x" else self.layer[name]
            assert got.dtype == like.dtype and got.shape == like.shape and got.is_contiguous(), name
            assert_close(got, expected[name], tolerance, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(device, shape, transposed, dtype):
    case = Case(*shape, device, dtype, transposed=transposed)
    y, h, norm, gain = case.forward()
    expected_y, expected = case.reference()
    assert y.dtype == dtype and h.shape == (shape[0], shape[3])
    assert_close(y, expected_y, TOLERANCE[dtype], "y")
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[dtype])
    case.check(case.backward(None, h, norm, gain), expected, TOLERANCE[dtype])  # u computed once more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wider_parameters_get_gradients_in_their_own_dtype(device, dtype):
    case = Case(130, 64, 96, 16, device, dtype, param_dtype=torch.float32)
    y, h, norm, gain = case.forward()
    assert y.dtype == dtype and norm.dtype == torch.float32
    _, expected = case.reference()
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(99, 301, 299, 16), (1, 1501, 1403, 16), (7, 701, 601, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_large_enough_for_our_own(transposed, bias, shape):
    """csrc/cpu/product_cpu.cpp, on the processors where it multiplies: edges of its tiles, two depths, any strides."""
    case = Case(*shape, "cpu", torch.float32, transposed=transposed, bias=bias)
    tokens, features = shape[:2]
    strided = torch.randn(tokens, 2 * features)
    for x in (case.x, strided[:, 1 : features + 1], strided[:, ::2]):
        case.x = x
        y, h, norm, gain = case.forward()
        expected_y, expected = case.reference()
        assert_close(y, expected_y, TOLERANCE[torch.float32], "y")
        case.x = x.contiguous()
        for saved in (y, None):
            case.check(case.backward(saved, h, norm, gain), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("saved", [True, False], ids=["y", "no y"])
@pytest.mark.parametrize("mask", range(32))
def test_every_mask_gives_what_it_asks_for_and_empty_tensors_otherwise(device, mask, saved):
    case = Case(33, 40, 56, 4, device, torch.float32)
    y, h, norm, gain = case.forward()
    _, expected = case.reference()
    results = case.backward(y if saved else None, h, norm, gain, mask)
    case.check(results, expected, TOLERANCE[torch.float32], mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_magnitude_gradient_of_small_zero_and_dead_features(device, transposed, dtype):
    """Where m is 0 or small the output has lost u, and the gradient comes another way; where n is 0 it is 0."""
    case = Case(40, 48, 100, 8, device, dtype, transposed=transposed, zero_rows=(5, 70))
    magnitude = case.layer["magnitude"]
    magnitude[3], magnitude[4], magnitude[90] = 0, 1e-6, -1e-3
    y, h, norm, gain = case.forward()
    assert norm[5] == 0 and gain[5] == 0
    assert torch.equal(y[:, 5], case.layer["bias"][5].to(dtype).expand(40))
    _, expected = case.reference()
    small = [3, 4, 90]
    for saved in (y, None):
        grad = case.backward(saved, h, norm, gain)[3]
        assert grad.isfinite().all() and grad[5] == 0 and grad[70] == 0
        assert_close(grad, expected["magnitude"], TOLERANCE[dtype], "magnitude")
        assert_close(grad[small], expected["magnitude"][small], 3 * TOLERANCE[dtype], "small gains")


def test_every_gain_zero(device):
    """More features to recover than are done at once."""
    case = Case(9, 24, 200, 4, device, torch.float32)
    case.layer["magnitude"].zero_()
    y, h, norm, gain = case.forward()
    _, expected = case.reference()
    assert_close(case.backward(y, h, norm, gain, 8)[3], expected["magnitude"], TOLERANCE[torch.float32])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(device, batch, bias):
    case = Case(7, 40, 56, 4, device, torch.float32, batch=batch, bias=bias)
    y, h, norm, gain = case.forward()
    expected_y, expected = case.reference()
    assert y.shape == (*batch, 7, 56)
    assert_close(y, expected_y, TOLERANCE[torch.float32])
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[torch.float32])


def test_one_dimensional_x(device):
    case = Case(1, 40, 56, 4, device, torch.float32)
    case.x, case.grad_y = case.x[0], case.grad_y[0]
    y, h, norm, gain = case.forward()
    expected_y, expected = case.reference()
    assert y.shape == (56,) and h.shape == (1, 4)
    assert_close(y, expected_y, TOLERANCE[torch.float32])
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_x_and_weight_and_expanded_gradient(device, dtype):
    case = Case(33, 40, 56, 4, device, dtype)
    case.x = case.x.repeat_interleave(2, dim=1)[:, ::2]
    case.layer["weight"] = torch.cat([case.layer["weight"]] * 2, 1)[:, :40]
    case.layer["lora_A"] = case.layer["lora_A"].T.contiguous().T
    case.layer["lora_B"] = case.layer["lora_B"].T.contiguous().T
    assert not case.x.is_contiguous() and not case.layer["weight"].is_contiguous()
    y, h, norm, gain = case.forward()
    for grad_y in (case.grad_y[:1].expand(33, 56), case.grad_y.T.contiguous().T, y.new_ones(()).expand(33, 56)):
        expected_y, expected = case.reference(grad_y)
        assert_close(y, expected_y, TOLERANCE[dtype])
        case.check(case.backward(y, h, norm, gain, grad_y=grad_y), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 3)], ids=str)
def test_empty_batch(device, shape, dtype):
    case = Case(1, 40, 56, 4, device, dtype)
    case.x, case.grad_y = case.x.new_empty(*shape, 40), case.x.new_empty(*shape, 56)
    y, h, norm, gain = case.forward()
    assert y.shape == (*shape, 56) and h.shape == (0, 4)
    for saved in (y, None):
        grads = case.backward(saved, h, norm, gain)
        assert grads[0].shape == case.x.shape
        for name, grad in zip(NAMES[1:], grads[1:], strict=True):
            assert grad.shape == case.layer[name].shape and not grad.any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice(device, dtype):
    case = Case(300, 128, 192, 16, device, dtype)
    runs = []
    for _ in range(2):
        y, h, norm, gain = case.forward()
        runs.append((y, h, norm, gain, *case.backward(y, h, norm, gain)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_given_norm_and_gain_are_used_and_not_returned_as_they_are(device):
    case = Case(33, 40, 56, 4, device, torch.float32)
    y, _, norm, gain = case.forward()
    doubled, _, norm_out, gain_out = case.forward(norm=norm, gain=2 * gain)
    bias = case.layer["bias"]
    assert_close(doubled - bias, 2 * (y - bias), 1e-5)
    assert norm_out.numel() == gain_out.numel() == 0  # the caller has them


def test_cached_norms(device):
    """linear_forward_cached is norm_cached and linear_forward at once."""
    case = Case(33, 40, 56, 8, device, torch.float32)
    t = case.layer
    kept = torch.full((56,), float("nan"), device=device)
    fingerprint = torch.zeros(4, dtype=torch.int64, device=device)
    factors = (case.x, t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], t["bias"], case.scaling, False)

    def expect(results, computed):
        assert int(fingerprint[3]) == computed
        for got, wanted in zip(results, case.forward(), strict=True):
            assert torch.equal(got, wanted)

    run = partial(torch.ops.dora_ext.linear_forward_cached, *factors, kept, fingerprint)
    expect(run(), 1)
    expect(run(), 1)
    assert torch.equal(kept, case.forward()[2])
    t["lora_B"].mul_(2)
    expect(run(), 2)
    expect(run(1), 3)  # another epoch
    kept.mul_(2)
    y, _, norm, _ = run(1)
    assert torch.equal(norm, kept) and int(fingerprint[3]) == 3  # taken as they are
    assert_close(y - t["bias"], (case.forward()[0] - t["bias"]) / 2, 1e-5)
    torch.library.opcheck(torch.ops.dora_ext.linear_forward_cached, (*factors, kept, fingerprint, 0))
    with pytest.raises(ValueError, match="cached: expected shape"):
        torch.ops.dora_ext.linear_forward_cached(*factors, kept[1:], fingerprint)


def test_inside_the_ops_nothing_is_recorded_or_recast(device):
    case = Case(33, 40, 56, 4, device, torch.float32)
    expected = case.forward()[0]
    case.layer["lora_A"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = case.forward()[0]
    assert y.dtype == torch.float32 and relative_error(y, expected) == 0


def broken(**change):
    def apply(case):
        for name, make in change.items():
            if name in ("x", "grad_y"):
                setattr(case, name, make(getattr(case, name)))
            else:
                case.layer[name] = make(case.layer[name])

    return apply


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (broken(x=lambda t: t[:, :-1]), ValueError, r"x: expected shape \(\.\.\., 40\)"),
        (broken(x=lambda t: t.double()), TypeError, "x: expected the dtype of weight"),
        (broken(x=lambda t: t.long()), TypeError, "x: expected bfloat16, float16, float32 or float64"),
        (broken(weight=lambda t: t.to(torch.complex64)), TypeError, "weight: expected bfloat16"),
        (broken(weight=lambda t: t[None]), ValueError, "weight: expected 2 dimensions"),
        (broken(lora_A=lambda t: t[:, 1:]), ValueError, r"lora_A: expected shape \(r, 40\)"),
        (
            broken(lora_A=lambda t: t[:0], lora_B=lambda t: t[:, :0]),
            ValueError,
            "lora_A: expected a rank of at least 1",
        ),
        (broken(lora_B=lambda t: t[:, 1:]), ValueError, r"lora_B: expected shape \(56, 4\)"),
        (broken(magnitude=lambda t: t[1:]), ValueError, r"magnitude: expected shape \[56\]"),
        (broken(bias=lambda t: t[1:]), ValueError, r"bias: expected shape \[56\]"),
    ],
)
def test_misfits_are_named(device, change, error, message):
    case = Case(33, 40, 56, 4, device, torch.float32)
    change(case)
    with pytest.raises(error, match=message):
        case.forward()


def test_backward_misfits_are_named(device):
    case = Case(33, 40, 56, 4, device, torch.float32)
    y, h, norm, gain = case.forward()
    with pytest.raises(ValueError, match="grad_y: expected shape"):
        case.backward(y, h, norm, gain, grad_y=case.grad_y[:, 1:])
    with pytest.raises(ValueError, match="h: expected shape"):
        case.backward(y, h[1:], norm, gain)
    with pytest.raises(ValueError, match="y: expected shape"):
        case.backward(y[1:], h, norm, gain)


def test_scaling_must_be_finite_and_norm_comes_with_gain(device):
    case = Case(33, 40, 56, 4, device, torch.float32)
    norm = case.forward()[2]
    with pytest.raises(ValueError, match="norm and gain: expected both or neither"):
        case.forward(norm=norm)
    case.scaling = float("inf")
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        case.forward()
