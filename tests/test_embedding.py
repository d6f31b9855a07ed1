"""dora_embedding: the autograd node and its checks. The raw ops have tests/test_embedding_op.py."""

import pytest
import torch
import torch.nn.functional as F

from dora_ext import reference
from dora_ext.ops import dora_embedding, norm_and_gain
from dora_ext.testing import DEVICES, DTYPES, TOLERANCE, assert_close, doubles

GRADIENTS = ["lora_A", "lora_B", "magnitude"]


def inputs(vocab, dim, r, dtype, device, param_dtype=None):
    t = {
        "weight": torch.randn(vocab, dim, dtype=torch.float64),
        "lora_A": torch.randn(r, vocab, dtype=torch.float64),
        "lora_B": torch.randn(dim, r, dtype=torch.float64),
        "magnitude": torch.rand(dim, dtype=torch.float64) + 0.5,
    }
    t = {k: v.to(dtype if k == "weight" else param_dtype or dtype).to(device) for k, v in t.items()}
    return {k: v.requires_grad_(k != "weight") for k, v in t.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "embed_scale": 1.5}])
def test_output_and_gradients_match_the_reference(device, dtype, compiled, options):
    torch._dynamo.reset()
    fn = torch.compile(dora_embedding, fullgraph=True) if compiled else dora_embedding
    t = inputs(29, 40, 8, dtype, device)
    ids = torch.randint(0, 7, (4, 11), device=device)  # many repeats, the padding among them
    y = fn(ids, **t, scaling=0.5, **options)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(device)
    y.backward(grad_y)
    ref = doubles(t)
    ref_y = reference.embedding(ids.cpu(), **ref, scaling=0.5, **options)
    ref_y.backward(grad_y.double().cpu())
    assert_close(y, ref_y, TOLERANCE[dtype], "y")
    for name in GRADIENTS:
        assert t[name].grad.dtype == t[name].dtype
        assert_close(t[name].grad, ref[name].grad, TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
def test_wider_adapters_and_int32_ids(device):
    t = inputs(29, 40, 8, torch.bfloat16, device, torch.float32)
    ids = torch.randint(0, 29, (50,), device=device, dtype=torch.int32)
    y = dora_embedding(ids, **t, scaling=0.5)
    y.sum().backward()
    ref = doubles(t)
    ref_y = reference.embedding(ids.cpu().long(), **ref, scaling=0.5)
    ref_y.sum().backward()
    assert_close(y, ref_y, TOLERANCE[torch.bfloat16], "y")
    for name in GRADIENTS:
        assert t[name].grad.dtype == torch.float32
        assert_close(t[name].grad, ref[name].grad, TOLERANCE[torch.bfloat16], name)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    t = inputs(9, 5, 2, torch.float64, device)
    ids = torch.tensor([[1, 8, 1], [0, 2, 2]], device=device)
    norm, _ = norm_and_gain(**t, scaling=0.5, transposed=True)

    def fn(a, b, m):
        return dora_embedding(ids, t["weight"], a, b, m, scaling=0.5, norm=norm, gain=(m / norm).detach())

    assert torch.autograd.gradcheck(fn, tuple(t[k] for k in GRADIENTS))


@pytest.mark.parametrize("device", DEVICES)
def test_scale_grad_by_freq_divides_by_the_count(device):
    t = inputs(9, 5, 2, torch.float64, device)
    ids = torch.tensor([1, 8, 1, 1], device=device)
    dora_embedding(ids, **t, scaling=0.5, scale_grad_by_freq=True).sum().backward()
    divided = t["lora_A"].grad.clone()
    t["lora_A"].grad = None
    dora_embedding(ids, **t, scaling=0.5).sum().backward()
    assert_close(divided[:, 1] * 3, t["lora_A"].grad[:, 1], 1e-12)
    assert_close(divided[:, 8], t["lora_A"].grad[:, 8], 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_max_norm_scales_looked_up_rows_in_place(device):
    t = inputs(9, 5, 2, torch.float64, device)
    weight, lora_A = t["weight"].clone(), t["lora_A"].detach().T.contiguous().clone()
    ids = torch.tensor([1, 8, 1], device=device)
    dora_embedding(ids, **t, scaling=0.5, max_norm=0.8)
    F.embedding(ids, weight, max_norm=0.8)
    F.embedding(ids, lora_A, max_norm=0.8)
    assert_close(t["weight"], weight, 1e-12)
    assert_close(t["lora_A"].T, lora_A, 1e-12)
    assert weight[1].norm() <= 0.8 + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, 29, 10**9])
def test_ids_out_of_range_are_refused_and_the_device_lives_on(device, bad):
    t = inputs(29, 8, 2, torch.float32, device)
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 29\)"):
        dora_embedding(torch.tensor([1, bad, 2], device=device), **t, scaling=1.0)
    y = dora_embedding(torch.tensor([1, 28, 2], device=device), **t, scaling=1.0)
    assert y.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_ids(device):
    t = inputs(29, 8, 2, torch.float32, device)
    y = dora_embedding(torch.empty(2, 0, dtype=torch.int64, device=device), **t, scaling=1.0)
    assert y.shape == (2, 0, 8)
    y.sum().backward()
    assert all(t[k].grad.count_nonzero() == 0 for k in GRADIENTS)


def test_bad_arguments_are_named():
    t = inputs(29, 8, 2, torch.float32, "cpu")
    ids = torch.tensor([1, 2])
    for change, error, message in [
        ({"ids": ids.float()}, TypeError, "ids: expected int64 or int32"),
        ({"padding_idx": 29}, ValueError, "padding_idx: expected it in"),
        ({"lora_A": torch.randn(2, 28)}, ValueError, "lora_A: expected shape"),
        ({"magnitude": torch.randn(29)}, ValueError, "magnitude: expected shape"),
    ]:
        with pytest.raises(error, match=message):
            dora_embedding(**{"ids": ids, **t, "scaling": 1.0, **change})


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_embeddings_alone(device):
    """As F.embedding: the result and the gradients are those without autocast, also when backward runs inside it."""
    t = inputs(29, 40, 8, torch.float32, device)
    ids = torch.randint(0, 29, (50,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = dora_embedding(ids, **t, scaling=0.5)
        y.square().sum().backward()
    ref = doubles(t)
    ref_y = reference.embedding(ids.cpu(), **ref, scaling=0.5)
    ref_y.square().sum().backward()
    assert_close(y, ref_y, 1e-5, "y")
    for name in GRADIENTS:
        assert_close(t[name].grad, ref[name].grad, 1e-5, name)
