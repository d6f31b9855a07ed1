"""The raw embedding ops against plain float64 formulas; dora_embedding, which checks and differentiates, has
tests/test_embedding.py."""

import pytest
import torch

from dora_ext.testing import DEVICES, DTYPES, assert_close

# One rounding of the result, and one of what the adapter contributes (A's columns or g B in half precision).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
S = 0.5


def inputs(vocab, dim, r, dtype, device, param_dtype=None):
    acc, param = torch.float64 if dtype == torch.float64 else torch.float32, param_dtype or dtype
    t = {
        "weight": torch.randn(vocab, dim, dtype=torch.float64).to(dtype),
        "lora_A": torch.randn(r, vocab, dtype=torch.float64).to(param),
        "lora_B": (torch.randn(dim, r, dtype=torch.float64) / r**0.5).to(param),
        "norm": (torch.rand(dim, dtype=torch.float64) + 0.5).to(acc),
        "gain": torch.randn(dim, dtype=torch.float64).to(acc),
    }
    t["norm"][0] = t["gain"][0] = 0
    return {k: v.to(device) for k, v in t.items()}


def forward(ids, t, embed_scale=1.0):
    return torch.ops.dora_ext.embedding_forward(
        ids, t["weight"], t["lora_A"], t["lora_B"], t["gain"], S, embed_scale
    )  # fmt: skip


def backward(grad_y, ids, t, embed_scale=1.0, padding_idx=-1, by_freq=False, mask=7):
    return torch.ops.dora_ext.embedding_backward(
        grad_y, ids, t["weight"], t["lora_A"], t["lora_B"], t["norm"], t["gain"], S, embed_scale, padding_idx, by_freq,
        mask,
    )  # fmt: skip


def truth(ids, t, embed_scale=1.0):
    """u (ids, dim) and y in float64 on the CPU; ids in range."""
    d = {k: v.double().cpu() for k, v in t.items()}
    ids = ids.cpu().long()
    u = d["weight"][ids] + S * d["lora_A"].T[ids] @ d["lora_B"].T
    return u, embed_scale * d["gain"] * u, d, ids


def truth_backward(grad_y, ids, t, embed_scale=1.0, padding_idx=-1, by_freq=False):
    u, _, d, ids = truth(ids, t)
    ids, dim = ids.flatten(), u.shape[-1]
    grad, u = embed_scale * grad_y.double().cpu().reshape(-1, dim), u.reshape(-1, dim)
    dm = torch.where(d["norm"] > 0, (grad * u).sum(0) / d["norm"], 0.0)
    dB = S * (grad * d["gain"]).T @ d["lora_A"].T[ids]
    shares = S * (grad * d["gain"]) @ d["lora_B"]
    if by_freq:
        shares = shares / torch.bincount(ids, minlength=d["weight"].shape[0])[ids][:, None]
    shares = torch.where((ids == padding_idx)[:, None], 0.0, shares)
    dA = torch.zeros_like(d["lora_A"].T).index_add_(0, ids, shares).T
    return dA, dB, dm


# (vocab, dim, r, tokens): single, odd, many repeats, more tokens and features than a tile, rank above a chunk.
SHAPES = [(1, 1, 1, 1), (29, 40, 8, 44), (11, 77, 3, 300), (1000, 136, 16, 257), (50, 264, 70, 130), (500, 24, 200, 65)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("embed_scale", [1.0, 1.5])
@pytest.mark.parametrize(("vocab", "dim", "r", "tokens"), SHAPES)
def test_forward(device, dtype, id_dtype, embed_scale, vocab, dim, r, tokens):
    t = inputs(vocab, dim, r, dtype, device)
    ids = torch.randint(0, vocab, (tokens,), device=device, dtype=id_dtype)
    y = forward(ids, t, embed_scale)
    assert y.dtype == dtype
    assert_close(y, truth(ids, t, embed_scale)[1], TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(1.0, -1, False), (1.5, 0, False), (1.0, -1, True)])
@pytest.mark.parametrize(("vocab", "dim", "r", "tokens"), SHAPES)
def test_backward(device, dtype, options, vocab, dim, r, tokens):
    t = inputs(vocab, dim, r, dtype, device)
    ids = torch.randint(0, vocab, (tokens,), device=device)
    grad_y = torch.randn(tokens, dim, dtype=torch.float64).to(dtype).to(device)
    grads = backward(grad_y, ids, t, *options)
    assert [g.dtype for g in grads] == [dtype, dtype, t["norm"].dtype]
    for name, got, expected in zip(["A", "B", "m"], grads, truth_backward(grad_y, ids, t, *options), strict=True):
        assert_close(got, expected, 2 * TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_adapters_get_wider_gradients(device, dtype):
    t = inputs(29, 40, 8, dtype, device, torch.float32)
    ids = torch.randint(0, 29, (3, 50), device=device)
    assert_close(forward(ids, t), truth(ids, t)[1], 2 * TOLERANCE[dtype])
    grad_y = torch.randn(3, 50, 40, dtype=torch.float64).to(dtype).to(device)
    grads = backward(grad_y, ids, t)
    assert all(g.dtype == torch.float32 for g in grads)
    for got, expected in zip(grads, truth_backward(grad_y, ids, t), strict=True):
        assert_close(got, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_id_many_times(device, dtype):
    """A run as long as the batch: its sum is kept in fp32, in any order, which may cost n 2^-24 of it."""
    tolerance = max(2 * TOLERANCE[dtype], 5000 * 2.0**-24)
    t = inputs(9, 40, 8, dtype, device)
    ids = torch.full((5000,), 4, device=device)
    grad_y = torch.ones(5000, 40, dtype=dtype, device=device)
    for got, expected in zip(backward(grad_y, ids, t), truth_backward(grad_y, ids, t), strict=True):
        assert_close(got, expected, tolerance)
    by_freq = backward(grad_y, ids, t, by_freq=True)[0]
    assert_close(by_freq, truth_backward(grad_y, ids, t, by_freq=True)[0], tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, 29, 10**12, -(2**62)])
def test_ids_out_of_range_give_nan_rows_and_no_gradient(device, bad):
    t = inputs(29, 40, 8, torch.float32, device)
    ids = torch.tensor([3, bad, 7, 3], device=device)
    y = forward(ids, t)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    good = torch.tensor([3, 7, 3], device=device)
    assert torch.equal(y[[0, 2, 3]], forward(good, t))
    grad_y = torch.randn(4, 40, device=device)
    expected = truth_backward(grad_y[[0, 2, 3]], good, t)
    for got, want in zip(backward(grad_y, ids, t), expected, strict=True):
        assert_close(got, want, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_the_mask_asks_for(device):
    t = inputs(29, 40, 8, torch.float32, device)
    ids = torch.randint(0, 29, (20,), device=device)
    grad_y = torch.randn(20, 40, device=device)
    everything = backward(grad_y, ids, t)
    for mask in range(8):
        for bit, (got, expected) in enumerate(zip(backward(grad_y, ids, t, mask=mask), everything, strict=True)):
            if mask >> bit & 1:
                assert_close(got, expected, 1e-6)
            else:
                assert got.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_and_strided_arguments(device):
    t = inputs(29, 40, 8, torch.float32, device)
    t["weight"] = torch.randn(29, 50, device=device)[:, 5:45]
    t["lora_A"] = torch.randn(29, 8, device=device).T
    t["lora_B"] = torch.randn(8, 40, device=device).T
    ids = torch.randint(0, 29, (6, 10), device=device)[:, ::2]
    assert_close(forward(ids, t), truth(ids, t)[1], 1e-5)
    for grad_y in (
        torch.ones((), device=device).expand(6, 5, 40),
        torch.randn(40, 5, 6, device=device).permute(2, 1, 0),
    ):
        for got, expected in zip(backward(grad_y, ids, t), truth_backward(grad_y, ids, t), strict=True):
            assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    t = inputs(29, 40, 8, torch.bfloat16, device)
    ids = torch.empty(2, 0, dtype=torch.int64, device=device)
    assert forward(ids, t).shape == (2, 0, 40)
    grads = backward(torch.empty(2, 0, 40, dtype=torch.bfloat16, device=device), ids, t)
    assert [tuple(g.shape) for g in grads] == [(8, 29), (40, 8), (40,)]
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(device, dtype):
    t = inputs(50, 136, 16, dtype, device)
    ids = torch.randint(0, 50, (2000,), device=device)
    grad_y = torch.randn(2000, 136, device=device).to(dtype)
    first = backward(grad_y, ids, t)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, backward(grad_y, ids, t), strict=True))


def test_bad_arguments_are_named():
    t = inputs(29, 40, 8, torch.float32, "cpu")
    ids = torch.tensor([1, 2])
    for change, error, message in [
        ({"lora_A": torch.randn(8, 28)}, ValueError, "lora_A: expected shape"),
        ({"lora_B": torch.randn(39, 8)}, ValueError, "lora_B: expected shape"),
        ({"gain": torch.randn(29)}, ValueError, "gain: expected shape"),
        ({"weight": torch.randn(29)}, ValueError, "weight: expected 2 dimensions"),
    ]:
        with pytest.raises(error, match=message):
            forward(ids, {**t, **change})
    with pytest.raises(TypeError, match="ids: expected int64 or int32"):
        forward(ids.float(), t)
    with pytest.raises(ValueError, match="grad_y: expected shape"):
        backward(torch.randn(2, 39), ids, t)
