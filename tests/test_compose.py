"""The raw ops around the products: compose, compose_ and compose_backward, against plain float64 formulas. Inputs are
exact in their dtype, so the only rounding in half precision is that of the result: at most 2^-8 (bfloat16) or 2^-11
(float16) of it."""

import pytest
import torch

from dora_ext.testing import DEVICES, DTYPES, assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Sums over tokens are kept in fp32 whatever the inputs' dtype.
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# (tokens, out, r): one of each; below, at and above tiles of 64 and 128 and chunks of 16 and 32 ranks; odd rows.
SHAPES = [(1, 1, 1), (5, 40, 3), (130, 24, 24), (64, 128, 16), (257, 136, 384), (33, 300, 33), (129, 77, 8)]
# (batch, channels, *positions), r
CHANNEL_SHAPES = [((2, 40, 16, 16), 16), ((3, 7, 5), 3), ((1, 65, 7, 7), 24), ((2, 9, 2, 3, 4), 70), ((4, 8, 1), 4)]
# Whole packs of eight positions, around tiles of 64 channels x 128 positions.
CHANNEL_SHAPES += [((2, 72, 136), 40), ((3, 130, 24), 33), ((1, 200, 12, 22), 64)]


def accumulate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape, dtype, device, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).to(device)


def features(out, dtype, device, bias):
    """Gain and bias (None for False); the bias has the layer's dtype, the gain never less than fp32."""
    gain = randn(out, dtype=accumulate(dtype), device=device)
    return gain, randn(out, dtype=dtype, device=device) if bias else None


def composed(base, h, lora_B, gain, bias, scaling, delta, feature_dim=-1):
    base, h, lora_B, gain = (t.double().cpu() for t in (base, h, lora_B, gain))
    bias = torch.zeros_like(gain) if bias is None else bias.double().cpu()
    base, low = base.movedim(feature_dim, -1), scaling * h.movedim(feature_dim, -1) @ lora_B.T
    y = (gain - 1) * (base - bias) + gain * low if delta else gain * (base + low) + bias
    return y.movedim(-1, feature_dim)


def composed_backward(grad, saved, norm, gain, bias, saved_is_output, delta, feature_dim=-1):
    grad, saved, norm, gain = (t.double().cpu() for t in (grad, saved, norm, gain))
    grad, saved = grad.movedim(feature_dim, -1), saved.movedim(feature_dim, -1)
    bias = torch.zeros_like(gain) if bias is None else bias.double().cpu()
    sums = (grad * (saved - bias)).flatten(0, -2).sum(0)
    lost = norm == 0
    if saved_is_output:
        lost = lost | (gain.abs() < 1 / 16)
        sums = sums / gain
    dm = torch.where(lost, 0.0, sums / norm)
    return ((gain - 1 if delta else gain) * grad).movedim(-1, feature_dim), dm, grad.flatten(0, -2).sum(0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("tokens", "out", "r"), SHAPES)
def test_compose_features_last(device, dtype, bias, delta, tokens, out, r):
    base, h = randn(tokens, out, dtype=dtype, device=device), randn(tokens, r, dtype=dtype, device=device)
    lora_B = randn(out, r, dtype=dtype, device=device, scale=r**-0.5)
    gain, b = features(out, dtype, device, bias)
    expected = composed(base, h, lora_B, gain, b, 1.5, delta)
    y = torch.ops.dora_ext.compose(base, h, lora_B, gain, b, 1.5, delta)
    assert y.dtype == dtype
    assert_close(y, expected, TOLERANCE[dtype], "compose")
    torch.ops.dora_ext.compose_(base, h, lora_B, gain, b, 1.5, delta)
    assert torch.equal(base, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("shape", "r"), CHANNEL_SHAPES)
def test_compose_channels_first(device, dtype, channels_last, delta, shape, r):
    base = randn(*shape, dtype=dtype, device=device)
    h = randn(shape[0], r, *shape[2:], dtype=dtype, device=device)
    if channels_last:
        base = base.movedim(1, -1).contiguous().movedim(-1, 1)
    lora_B = randn(shape[1], r, dtype=dtype, device=device, scale=r**-0.5)
    gain, b = features(shape[1], dtype, device, True)
    expected = composed(base, h, lora_B, gain, b, 0.5, delta, 1)
    y = torch.ops.dora_ext.compose(base, h, lora_B, gain, b, 0.5, delta, True)
    assert_close(y, expected, TOLERANCE[dtype], "compose")
    torch.ops.dora_ext.compose_(base, h, lora_B, gain, b, 0.5, delta, True)
    assert torch.equal(base, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compose_of_strided_and_offset_tensors(device, dtype):
    """Views that start off 16 bytes, skip columns, or are expanded; in place, the rest of the storage stays."""
    storage = randn(70, 200, dtype=dtype, device=device)
    before, base = storage.clone(), storage[:, 3:139]
    h = randn(16, 70, dtype=dtype, device=device).T
    lora_B = randn(136, 33, dtype=dtype, device=device)[:, 1:17]
    gain, b = features(136, dtype, device, True)
    expected = composed(base, h, lora_B, gain, b, 1.0, False)
    assert_close(torch.ops.dora_ext.compose(base, h, lora_B, gain, b, 1.0), expected, TOLERANCE[dtype])
    torch.ops.dora_ext.compose_(base, h, lora_B, gain, b, 1.0)
    assert_close(storage[:, 3:139], expected, TOLERANCE[dtype])
    assert torch.equal(storage[:, :3], before[:, :3]) and torch.equal(storage[:, 139:], before[:, 139:])
    # Contiguous, but two bytes (or four) past a multiple of 16.
    flat = randn(70 * 136 + 1, dtype=dtype, device=device)[1:].view(70, 136)
    assert_close(
        torch.ops.dora_ext.compose(flat, h, lora_B, gain, b, 1.0),
        composed(flat, h, lora_B, gain, b, 1.0, False),
        TOLERANCE[dtype],
    )
    row = randn(136, dtype=dtype, device=device).expand(70, 136)
    assert_close(
        torch.ops.dora_ext.compose(row, h, lora_B, gain, b, 1.0),
        composed(row, h, lora_B, gain, b, 1.0, False),
        TOLERANCE[dtype],
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("off", ["nothing", "base", "h", "lora_B"])
@pytest.mark.parametrize(
    ("tokens", "out", "r"), [(1000, 1160, 65), (2100, 520, 100), (1000, 1032, 384), (513, 2056, 512), (1100, 1032, 136)]
)
def test_compose_high_ranks(dtype, off, tokens, out, r):
    """Enough tiles for the kernel that walks them, whose last rows and columns are cut off; views off 16 bytes."""
    tensors = {"base": (tokens, out), "h": (tokens, r), "lora_B": (out, r)}
    for name, shape in tensors.items():
        flat = randn(shape[0] * shape[1] + 1, dtype=dtype, device="cuda", scale=r**-0.5 if name == "lora_B" else 1.0)
        tensors[name] = (flat[1:] if name == off else flat[:-1]).view(shape)
    gain, bias = features(out, dtype, "cuda", True)
    for delta in (False, True):
        y = torch.ops.dora_ext.compose(*tensors.values(), gain, bias, 0.7, delta)
        assert_close(y, composed(*tensors.values(), gain, bias, 0.7, delta), TOLERANCE[dtype])
        assert torch.equal(torch.ops.dora_ext.compose(*tensors.values(), gain, bias, 0.7, delta), y)
    torch.ops.dora_ext.compose_(*tensors.values(), gain, bias, 0.7, True)
    assert torch.equal(tensors["base"], y)


@pytest.mark.parametrize("device", DEVICES)
def test_compose_takes_wider_parameters_and_leading_dimensions(device):
    base = randn(3, 5, 48, dtype=torch.bfloat16, device=device)
    h = randn(3, 5, 8, dtype=torch.bfloat16, device=device)
    lora_B = randn(48, 8, dtype=torch.float32, device=device, scale=8**-0.5)
    gain, bias = randn(48, dtype=torch.float64, device=device), randn(48, dtype=torch.float64, device=device)
    y = torch.ops.dora_ext.compose(base, h, lora_B, gain, bias, 2.0)
    # lora_B may be rounded to bfloat16 inside: one rounding more.
    assert y.shape == base.shape and y.dtype == torch.bfloat16
    assert_close(y, composed(base, h, lora_B, gain, bias, 2.0, False), 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_values_do_not_overflow_or_lose_bits_inside(device, dtype):
    """In fp16 neither s h B^T nor base fits where only their sum does; a token's NaN stays with the token."""
    base = randn(20, 64, dtype=dtype, device=device, scale=100) + 3e4
    h, lora_B = torch.full((20, 16), 50.0, dtype=dtype, device=device), torch.full((64, 16), -50.0, device=device)
    gain = 0.5 * torch.rand(64, device=device) + 0.5
    y = torch.ops.dora_ext.compose(base, h, lora_B.to(dtype), gain, None, 2.0)
    assert_close(y, composed(base, h, lora_B, gain, None, 2.0, False), TOLERANCE[dtype])
    base[7, 3] = float("nan")
    again = torch.ops.dora_ext.compose(base, h, lora_B.to(dtype), gain, None, 2.0)
    assert again[7, 3].isnan() and again.isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved_is_output", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("tokens", "out"), [(1, 1), (5, 40), (700, 136), (257, 264), (3000, 7), (64, 2056)])
def test_compose_backward_features_last(device, dtype, saved_is_output, delta, tokens, out):
    grad, saved = (randn(tokens, out, dtype=dtype, device=device) for _ in range(2))
    gain, bias = features(out, dtype, device, out != 40)
    norm = gain.abs() + 0.5
    norm[0] = gain[0] = 0
    if out > 2:
        gain[1], gain[2] = 0.01, -0.02  # too small to divide by
    G, dm, db = torch.ops.dora_ext.compose_backward(grad, saved, norm, gain, bias, saved_is_output, delta)
    expected = composed_backward(grad, saved, norm, gain, bias, saved_is_output, delta)
    assert G.dtype == dtype and dm.dtype == db.dtype == norm.dtype
    assert_close(G, expected[0], TOLERANCE[dtype], "G")
    assert_close(dm, expected[1], SUM_TOLERANCE[dtype], "grad_magnitude")
    assert_close(db, expected[2], SUM_TOLERANCE[dtype], "grad_bias")
    assert dm[0] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 40, 16, 16), (3, 7, 5), (600, 3, 9), (1, 5, 3000), (2, 4, 64, 40)])
def test_compose_backward_channels_first(device, dtype, channels_last, shape):
    grad, saved = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
    if channels_last:
        saved = saved.movedim(1, -1).contiguous().movedim(-1, 1)
    gain, bias = features(shape[1], dtype, device, True)
    norm = gain.abs() + 0.5
    G, dm, db = torch.ops.dora_ext.compose_backward(grad, saved, norm, gain, bias, False, True, True)
    expected = composed_backward(grad, saved, norm, gain, bias, False, True, 1)
    assert_close(G, expected[0], TOLERANCE[dtype], "G")
    assert_close(dm, expected[1], SUM_TOLERANCE[dtype], "grad_magnitude")
    assert_close(db, expected[2], SUM_TOLERANCE[dtype], "grad_bias")


@pytest.mark.parametrize("device", DEVICES)
def test_compose_backward_of_expanded_and_strided_gradients(device):
    saved = randn(4, 50, 40, dtype=torch.float32, device=device)
    gain, bias = features(40, torch.float32, device, True)
    norm = gain.abs() + 0.5
    for grad in (
        torch.ones((), device=device).expand(4, 50, 40),
        randn(40, 50, 4, dtype=torch.float32, device=device).permute(2, 1, 0),
        randn(4, 1, 40, dtype=torch.float32, device=device).expand(4, 50, 40),
    ):
        out = torch.ops.dora_ext.compose_backward(grad, saved, norm, gain, bias, True)
        for got, expected in zip(out, composed_backward(grad, saved, norm, gain, bias, True, False), strict=True):
            assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("shape", [(40, 136, 24), (3, 7, 5)])
def test_sums_without_the_scaled_gradient_are_the_same(device, dtype, channels_first, shape):
    grad, saved = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
    gain, bias = features(shape[1 if channels_first else 2], dtype, device, True)
    args = (grad, saved, gain.abs() + 0.5, gain, bias, True, False, channels_first)
    _, *expected = torch.ops.dora_ext.compose_backward(*args)
    G, *sums = torch.ops.dora_ext.compose_backward(*args, want_G=False)
    assert G.numel() == 0 and all(map(torch.equal, sums, expected))
    torch.library.opcheck(torch.ops.dora_ext.compose_backward.default, (*args, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_magnitudes_gradient_in_a_dtype_of_its_own(device, dtype, wanted):
    grad, saved = (randn(40, 24, dtype=dtype, device=device) for _ in range(2))
    gain, bias = features(24, dtype, device, True)
    args = (grad, saved, gain.abs() + 0.5, gain, bias, True, False, False, False)
    _, expected, db = torch.ops.dora_ext.compose_backward(*args)
    _, dm, db_again = torch.ops.dora_ext.compose_backward(*args, magnitude_dtype=wanted)
    assert dm.dtype == wanted and torch.equal(dm, expected.to(wanted)) and torch.equal(db, db_again)
    torch.library.opcheck(torch.ops.dora_ext.compose_backward.default, (*args, wanted))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_first", [False, True])
def test_empty_batches(device, channels_first):
    shape, h_shape = ((0, 6, 4), (0, 2, 4)) if channels_first else ((4, 0, 6), (4, 0, 2))
    base, h, lora_B = (torch.randn(s, device=device) for s in (shape, h_shape, (6, 2)))
    ones = torch.ones(6, device=device)
    assert torch.ops.dora_ext.compose(base, h, lora_B, ones, ones, 1.0, False, channels_first).shape == shape
    torch.ops.dora_ext.compose_(base, h, lora_B, ones, ones, 1.0, False, channels_first)
    G, dm, db = torch.ops.dora_ext.compose_backward(base, base, ones, ones, ones, True, False, channels_first)
    assert G.shape == shape
    assert torch.equal(dm, torch.zeros_like(ones)) and torch.equal(db, torch.zeros_like(ones))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(device, dtype):
    tokens, out = 3000, 264
    grad, saved = (randn(tokens, out, dtype=dtype, device=device) for _ in range(2))
    gain, bias = features(out, dtype, device, True)
    first = torch.ops.dora_ext.compose_backward(grad, saved, gain.abs(), gain, bias, True)
    for _ in range(3):
        again = torch.ops.dora_ext.compose_backward(grad, saved, gain.abs(), gain, bias, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bad_arguments_are_named():
    base, h, lora_B, ones = torch.randn(3, 6), torch.randn(3, 2), torch.randn(6, 2), torch.ones(6)
    for args, error, message in [
        ((base, torch.randn(3, 3), lora_B, ones, None, 1.0), ValueError, "h: expected shape"),
        ((base, h.double(), lora_B, ones, None, 1.0), TypeError, "h: expected the dtype of base"),
        ((base, h, torch.randn(5, 2), ones, None, 1.0), ValueError, "lora_B: expected shape"),
        ((base, h, lora_B, torch.ones(5), None, 1.0), ValueError, "gain: expected shape"),
        ((base, h, lora_B, ones, torch.ones(6, 1), 1.0), ValueError, "bias: expected shape"),
        ((base, h, lora_B, ones, None, float("inf")), ValueError, "scaling: expected a finite number"),
        ((base.int(), h, lora_B, ones, None, 1.0), TypeError, "base: expected bfloat16"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.dora_ext.compose(*args)
    with pytest.raises(ValueError, match="saved: expected shape"):
        torch.ops.dora_ext.compose_backward(base, base[:2], ones, ones, None, True)
