"""torch.ops.dora_ext.embedding: what its autograd node does beside the gradients, which tests/test_embedding.py has."""

from functools import partial

import pytest
import torch
from autograd_cases import (
    as_parameters,
    backward_again_needs_retain_graph,
    makes_no_graph_without_need,
    refuses_second_and_forward_derivatives,
    seen_by_hooks,
    with_compiled_autograd,
)

from dora_ext import _load
from dora_ext.ops import dora_embedding, norm_and_gain
from dora_ext.testing import DEVICES

NAMES = ["lora_A", "lora_B", "magnitude"]
IDS = torch.tensor([[1, 8, 1], [0, 2, 8]])
embedding = torch.ops.dora_ext.embedding


def problem(device="cpu", requires_grad=True):
    t = {
        "weight": torch.randn(9, 16),
        "lora_A": torch.randn(4, 9),
        "lora_B": torch.randn(16, 4),
        "magnitude": torch.rand(16) + 0.5,
    }
    return {k: v.to(device).requires_grad_(requires_grad and k != "weight") for k, v in t.items()}


def norm_of(t):
    return norm_and_gain(**t, scaling=1.5, transposed=True)


def layer(ids=IDS, **t):
    return dora_embedding(ids, **t, scaling=1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("options", [(), (1.5, 8, True)])
def test_opcheck(device, requires_grad, options):
    t = problem(device, requires_grad)
    torch.library.opcheck(embedding, (IDS.to(device), *t.values(), *norm_of(t), 1.5, *options))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_the_backward_with_a_magnitude_in_another_dtype(device):
    t = problem(device, requires_grad=False)
    args = (torch.randn(2, 3, 16, device=device), IDS.to(device), *list(t.values())[:3], *norm_of(t), 1.5, 1.0, -1)
    op = torch.ops.dora_ext.embedding_backward
    torch.library.opcheck(op, (*args, False, 7, torch.bfloat16))
    wide, narrow = (op(*args, False, 7, dtype)[2] for dtype in (None, torch.bfloat16))
    assert torch.equal(narrow, wide.bfloat16())


def test_inference_mode_and_its_fake():
    t = problem()
    expected = layer(**t)
    with torch.inference_mode():
        inside = {k: v.clone() for k, v in t.items()}
        y = layer(IDS.clone(), **inside)
        assert torch.equal(y, expected)
        norms = norm_of(inside)
        mode = torch._subclasses.FakeTensorMode()
        fakes = [mode.from_tensor(v) for v in (IDS.clone(), *inside.values(), *norms)]
        with mode:
            fake = embedding(*fakes, 1.5)
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


def test_constants_get_no_gradient():
    t = problem()
    t["weight"].requires_grad_()
    norm, gain = (torch.rand(16, requires_grad=True) for _ in range(2))
    layer(**t, norm=norm, gain=gain).sum().backward()
    assert all(t[name].grad is not None for name in NAMES)
    assert t["weight"].grad is None and norm.grad is None and gain.grad is None


@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_is_asked_for(wanted):
    t = problem()
    everything = dict(zip(NAMES, torch.autograd.grad(layer(**t).square().sum(), [t[n] for n in NAMES]), strict=True))
    leaves = {k: v.detach().requires_grad_(k == wanted) for k, v in t.items()}
    layer(**leaves).square().sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, everything[wanted])
    assert all(leaves[k].grad is None for k in leaves if k != wanted)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("which", ["gain", "lora_B"])
def test_what_is_overwritten_before_backward(which, held):
    t = problem()
    norm, gain = norm_of(t)
    y = embedding(IDS, *t.values(), norm, gain, 1.5, held=held)
    with torch.no_grad():
        {"gain": gain, **t}[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_graph_without_need():
    makes_no_graph_without_need(layer, problem)


@pytest.mark.parametrize("parameters", [True, False])
def test_what_hooks_on_saved_tensors_see(parameters):
    t = as_parameters(problem()) if parameters else problem()
    saved = seen_by_hooks(partial(layer, **t))
    assert saved == [(2, 3)] + [(9, 16), (4, 9), (16, 4)] * (not parameters)


def test_backward_again_needs_retain_graph():
    t = problem()
    backward_again_needs_retain_graph(layer(**t), [t[n] for n in NAMES])


def test_second_and_forward_derivatives_are_refused():
    t = problem()
    refuses_second_and_forward_derivatives(lambda lora_A: layer(**{**t, "lora_A": lora_A}), t["lora_A"])


def test_compiled_autograd():
    t = problem()

    def gradients(y):
        return dict(zip(NAMES, torch.autograd.grad(y.sum(), [t[n] for n in NAMES]), strict=True))

    for results, expected in with_compiled_autograd(lambda: layer(**t).relu(), gradients, t["lora_B"]):
        for name in NAMES:
            torch.testing.assert_close(results[name], expected[name])


def test_ids_that_are_saved_must_not_change():
    t, ids = problem(), IDS.clone()
    y = layer(ids, **t)
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_same_as_through_torch_ops():
    t = problem()
    args = (IDS, *t.values(), *norm_of(t), 1.5, 1.0, 8, True, False)
    here, there = _load.module.embedding(*args), embedding(*args)
    assert torch.equal(here, there)
    for one, other in zip(*(torch.autograd.grad(y.sum(), [t[n] for n in NAMES]) for y in (here, there)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_look_at_the_ids(device, dtype):
    t = problem(device)
    for good in (torch.tensor(8), torch.arange(9).flip(0), IDS.t(), IDS[:, ::2], torch.tensor([5]).expand(3, 4)):
        assert layer(good.to(device, dtype), **t).shape == (*good.shape, 16)
    for bad, which in (([9, 0], 9), ([3, -1], -1), ([-7, 12], -7), ([[1, 2**31 - 1]], 2**31 - 1)):
        with pytest.raises(IndexError, match=rf"ids: expected values in \[0, 9\), got {which}$"):
            layer(torch.tensor(bad, dtype=dtype, device=device), **t)
