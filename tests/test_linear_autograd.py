"""torch.ops.dora_ext.linear: what its autograd node does beside the gradients, which tests/test_linear.py has."""

from functools import partial

import pytest
import torch
from autograd_cases import (
    as_parameters,
    backward_again_needs_retain_graph,
    constants_get_no_gradient,
    makes_no_graph_without_need,
    opcheck_kept,
    refuses_second_and_forward_derivatives,
    seen_by_hooks,
    with_compiled_autograd,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dora_ext.ops import dora_linear
from dora_ext.testing import DEVICES, adapter

linear = torch.ops.dora_ext.linear
NAMES = ["x", "lora_A", "lora_B", "magnitude", "bias"]


def problem(device="cpu", dtype=torch.float32, requires_grad=True):
    t = adapter(24, 40, 8, dtype=dtype, device=device)
    t["x"] = torch.randn(5, 13, 40, dtype=torch.float64).to(dtype).to(device)
    order = ["x", "weight", "lora_A", "lora_B", "magnitude", "bias"]
    return {k: t[k].detach().requires_grad_(requires_grad and k != "weight") for k in order}


def gradients(y, t):
    return dict(zip(NAMES, torch.autograd.grad(y.sum(), [t[n] for n in NAMES], retain_graph=True), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kept", [False, True])
def test_opcheck(device, requires_grad, kept):
    t = problem(device, requires_grad=requires_grad)
    opcheck_kept(linear, (*t.values(), None, None, 2.0, False), 24, device, kept)


def test_constants_get_no_gradient():
    constants_get_no_gradient(partial(dora_linear, scaling=2.0), problem, 24)


def test_a_norm_and_gain_of_inference_mode():
    t = problem()
    with torch.inference_mode():
        norm, gain = (torch.rand(24) for _ in range(2))
    dora_linear(**t, norm=norm, gain=gain, scaling=2.0).relu_().sum().backward()
    first = t["magnitude"].grad
    t["magnitude"].grad = None
    dora_linear(**t, norm=norm.clone(), gain=gain.clone(), scaling=2.0).relu().sum().backward()
    torch.testing.assert_close(t["magnitude"].grad, first)


def test_weight_gets_no_gradient():
    t = problem()
    t["weight"].requires_grad_()
    dora_linear(**t, scaling=2.0).sum().backward()
    assert t["x"].grad is not None and t["weight"].grad is None


def test_no_graph_without_need():
    makes_no_graph_without_need(partial(dora_linear, scaling=2.0), problem)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_saves_no_constants_and_the_output_where_the_magnitude_needs_it(magnitude, parameters):
    """Under activation checkpointing each saved tensor costs the host as much as a small launch."""
    t = as_parameters(problem()) if parameters else problem()
    t["magnitude"].requires_grad_(magnitude)
    saved = seen_by_hooks(partial(dora_linear, **t, scaling=2.0))
    weight_A_B_bias = [(24, 40), (8, 40), (24, 8), (24,)]
    assert saved == [(5, 13, 40), (65, 8)] + [(5, 13, 24)] * magnitude + weight_A_B_bias * (not parameters)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("changed", ["weight", "lora_A", "lora_B", "bias"])
def test_a_parameter_overwritten_before_backward_is_an_error(checkpointing, changed):
    t = as_parameters(problem())
    layer = partial(dora_linear, **t, scaling=2.0)
    y = checkpoint(layer, use_reentrant=False) if checkpointing else layer()
    with torch.no_grad():
        t[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_copy_made_for_one_call_is_free_after_backward():
    """autocast's copy of a wider weight, though the node is still there."""
    t = as_parameters(problem())
    copies = []

    def pack(t):
        copies.extend([StorageWeakRef(t.untyped_storage())] * (t.shape == (24, 40)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(**t, scaling=2.0)
    y.float().sum().backward()
    assert y.grad_fn is not None and [copy.expired() for copy in copies] == [True]


def test_backward_again_needs_retain_graph():
    t = problem()
    backward_again_needs_retain_graph(dora_linear(**t, scaling=2.0), [t[n] for n in NAMES])


def test_memory_is_free_after_backward():
    """Nothing of the output's size hangs on the node any more."""
    t = problem()
    y = dora_linear(**t, scaling=2.0)
    storage = StorageWeakRef(y.untyped_storage())
    node = y.grad_fn
    y.sum().backward()
    del y
    assert node is not None and storage.expired()


def test_second_and_forward_derivatives_are_refused():
    t = problem()
    refuses_second_and_forward_derivatives(lambda x: dora_linear(**{**t, "x": x}, scaling=2.0), t["x"])


@pytest.mark.parametrize("overwritten", [False, True])
def test_compiled_autograd(overwritten):
    t = problem()

    def forward():
        y = dora_linear(**t, scaling=1.5)
        return y.relu_() if overwritten else y.relu()

    for results, expected in with_compiled_autograd(forward, lambda y: gradients(y, t), t["lora_B"]):
        for name in NAMES:
            torch.testing.assert_close(results[name], expected[name])


def test_compiled_autograd_of_held_parameters():
    t = as_parameters(problem())

    def forward():
        return checkpoint(partial(dora_linear, **t, scaling=1.5), use_reentrant=False)

    for results, expected in with_compiled_autograd(forward, lambda y: gradients(y, t), t["lora_B"]):
        for name in NAMES:
            torch.testing.assert_close(results[name], expected[name])
