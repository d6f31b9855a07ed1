import pytest
import torch

from dora_ext import reference
from dora_ext.ops import norm_and_gain, weight_norm
from dora_ext.testing import DEVICES, DTYPES, adapter, assert_close, doubles

# Odd sizes and ranks, one feature, a rank above the tensor cores' step, a wide and a tall one.
SHAPES = [(1, 1, 1), (7, 13, 3), (40, 24, 16), (129, 65, 24), (64, 1000, 8), (1000, 64, 70)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out", "inn", "r"), SHAPES)
def test_norm_and_gain_match_the_reference(device, dtype, transposed, out, inn, r):
    t = adapter(out, inn, r, dtype=dtype, device=device, transposed=transposed, bias=False)
    norm, gain = norm_and_gain(**t, scaling=1.5, transposed=transposed)
    ref = doubles(t)
    expected = reference.weight_norm(ref["weight"], ref["lora_A"], ref["lora_B"], 1.5, transposed)
    assert norm.dtype == gain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(norm, expected, tolerance, "norm")
    assert_close(gain, reference.gain(ref["magnitude"], expected), tolerance, "gain")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_half_weights_with_float32_adapters(device, dtype):
    t = adapter(48, 96, 8, dtype=dtype, device=device, param_dtype=torch.float32, bias=False)
    norm, _ = norm_and_gain(**t, scaling=2.0)
    ref = doubles(t)
    # A and B are rounded to the weight's dtype once.
    assert_close(norm, reference.weight_norm(ref["weight"], ref["lora_A"], ref["lora_B"], 2.0), 2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows_have_no_gain(device):
    t = adapter(16, 32, 4, dtype=torch.float32, device=device, zero_rows=(3, 15), bias=False)
    norm, gain = norm_and_gain(**t, scaling=1.0)
    assert norm[3] == norm[15] == gain[3] == gain[15] == 0
    assert gain.isfinite().all() and (gain != 0).sum() == 14


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_does_not_overflow_inside(device):
    weight = torch.full((8, 4096), 300.0, dtype=torch.float16, device=device)
    norm = weight_norm(weight, weight.new_zeros(4, 4096), weight.new_zeros(8, 4), scaling=1.0)
    assert_close(norm, torch.full((8,), 300.0 * 64), 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_that_almost_cancels_is_exact(device):
    """W + s B A nearly zero: the factored form |W|^2 + 2 s W.BA + s^2 |BA|^2 would return noise here."""
    a, b = torch.randn(4, 512, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    small = 1e-3 * torch.randn(64, 512, dtype=torch.float64)
    weight, a, b = ((t.to(torch.float32).to(device)) for t in (small - b @ a, a, b))
    norm = weight_norm(weight, a, b, scaling=1.0)
    expected = (weight.double() + b.double() @ a.double()).norm(dim=1)
    assert_close(norm, expected, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 3, 1)])
def test_convolution_norm_is_that_of_the_effective_weight(device, groups, kernel):
    w = torch.randn(8, 12 // groups, *kernel, dtype=torch.float64, device=device)
    a = torch.randn(4, 12, *kernel, dtype=torch.float64, device=device)
    b = torch.randn(8, 4 // groups, *([1] * len(kernel)), dtype=torch.float64, device=device)
    norm = weight_norm(w, a, b, scaling=0.7)
    assert_close(norm, reference.weight_norm(w.cpu(), a.cpu(), b.cpu(), 0.7), 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_weights(device):
    w = torch.randn(8, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    a, b = torch.randn(4, 6, 3, 3, device=device), torch.randn(8, 4, 1, 1, device=device)
    assert_close(
        weight_norm(w, a, b, scaling=0.7), reference.weight_norm(w.double(), a.double(), b.double(), 0.7), 1e-6
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_ops_take_a_convolutions_weights(device, channels_last):
    w, a, b = (torch.randn(*size, device=device) for size in ((8, 6, 3, 3), (4, 6, 3, 3), (8, 4, 1, 1)))
    if channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    m = torch.rand(1, 8, 1, 1, device=device) + 0.5
    ops = torch.ops.dora_ext
    expected = ops.norm(w.flatten(1), a.flatten(1), b.flatten(1), m.flatten(), 0.7)
    state = (torch.zeros(8, device=device), torch.zeros(4, dtype=torch.int64, device=device))
    for norm, gain in (
        ops.norm(w, a, b, m, 0.7),
        ops.norm_cached(w, a, b, m, 0.7, False, *state),
        ops.norm_cached(w, a, b, m, 0.7, False, *state),
    ):
        assert_close(norm, expected[0], 1e-6)
        assert_close(gain, expected[1], 1e-6)
    assert state[1][3] == 1  # the second time it is the first one's
    torch.library.opcheck(ops.norm.default, (w, a, b, m, 0.7))
    with pytest.raises(ValueError, match="lora_A: expected shape"):
        ops.norm(w, a[:, :3], b, m, 0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_twice(device, dtype, transposed):
    t = adapter(300, 500, 16, dtype=dtype, device=device, transposed=transposed, bias=False)
    first = norm_and_gain(**t, scaling=1.0, transposed=transposed)
    for _ in range(3):
        again = norm_and_gain(**t, scaling=1.0, transposed=transposed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    t = adapter(12, 20, 4, dtype=torch.float32, device=device, bias=False)
    args = tuple(v.detach() for v in (t["weight"], t["lora_A"], t["lora_B"], t["magnitude"]))
    torch.library.opcheck(torch.ops.dora_ext.norm.default, (*args, 0.5))
    state = (torch.zeros(12, device=device), torch.zeros(4, dtype=torch.int64, device=device))
    # The op depends on what its fingerprint saw before, which opcheck's replays rightly notice: schema and fake only.
    torch.library.opcheck(
        torch.ops.dora_ext.norm_cached.default,
        (*args, 0.5, False, *state),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_norms_of_another_epoch_are_not_used():
    weight, lora_A, lora_B, magnitude = torch.randn(6, 80), torch.randn(2, 80), torch.randn(6, 2), torch.ones(6)
    cached, fingerprint = torch.empty(6), torch.zeros(4, dtype=torch.int64)

    def norm(epoch: int) -> torch.Tensor:
        return torch.ops.dora_ext.norm_cached(
            weight, lora_A, lora_B, magnitude, 1.5, False, cached, fingerprint, epoch
        )[0]

    expected = reference.weight_norm(weight, lora_A, lora_B, 1.5)
    for epoch, computed in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3)):
        if computed > fingerprint[3]:
            cached.mul_(2)  # what must not be given out
        torch.testing.assert_close(norm(epoch), expected)
        assert fingerprint[3] == computed


def test_bad_arguments_are_named():
    w, a, b, m = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)
    for args, error, message in [
        ((w, torch.randn(2, 7), b, m, 1.0), ValueError, "lora_A: expected shape"),
        ((w, a, torch.randn(6, 3), m, 1.0), ValueError, "lora_B: expected shape"),
        ((w, a, b, torch.randn(5), 1.0), ValueError, "magnitude: expected shape"),
        ((w, torch.randn(0, 8), torch.randn(6, 0), m, 1.0), ValueError, "rank of at least 1"),
        ((w.int(), a, b, m, 1.0), TypeError, "weight: expected bfloat16"),
        ((w.cfloat(), a, b, m, 1.0), TypeError, "weight: expected bfloat16"),
        ((w, a, b, m, float("nan")), ValueError, "scaling: expected a finite number"),
        ((w, a, b, m, float("inf")), ValueError, "scaling: expected a finite number"),
        ((w[0], a, b, m, 1.0), ValueError, "weight: expected 2 dimensions"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.dora_ext.norm(*args)


@pytest.mark.cuda
def test_tensors_on_two_devices_are_refused():
    w, a, b, m = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)
    with pytest.raises(ValueError, match="lora_A: expected it on cuda:0 like weight, got cpu"):
        torch.ops.dora_ext.norm(w.cuda(), a, b.cuda(), m.cuda(), 1.0)
