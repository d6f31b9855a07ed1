"""torch.ops.dora_ext.conv: what its autograd node does beside the gradients, which tests/test_conv.py has."""

from functools import partial

import pytest
import torch
from autograd_cases import (
    as_parameters,
    backward_again_needs_retain_graph,
    constants_get_no_gradient,
    makes_no_graph_without_need,
    refuses_second_and_forward_derivatives,
    seen_by_hooks,
    with_compiled_autograd,
)

from dora_ext.ops import dora_conv, norm_and_gain
from dora_ext.testing import DEVICES

NAMES = ["x", "lora_A", "lora_B", "magnitude", "bias"]
GEOMETRY = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation


def problem(device="cpu", groups=1, requires_grad=True, channels_last=False):
    t = {
        "x": torch.randn(3, 12, 9, 8),
        "weight": torch.randn(8, 12 // groups, 3, 2) / 6,
        "lora_A": torch.randn(4, 12, 3, 2) / 6,
        "lora_B": torch.randn(8, 4 // groups, 1, 1),
        "magnitude": torch.rand(1, 8, 1, 1) + 0.5,
        "bias": torch.randn(8),
    }
    t = {k: v.to(device) for k, v in t.items()}
    if channels_last:
        t |= {k: t[k].contiguous(memory_format=torch.channels_last) for k in ("x", "weight")}
    return {k: v.requires_grad_(requires_grad and k != "weight") for k, v in t.items()}


def norm_of(t):
    return norm_and_gain(t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], scaling=1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_opcheck(device, requires_grad, channels_last, groups):
    t = problem(device, groups, requires_grad, channels_last)
    torch.library.opcheck(torch.ops.dora_ext.conv, (*t.values(), *norm_of(t), 1.5, *GEOMETRY, groups))


@pytest.mark.parametrize("channels_last", [True, False])
def test_inference_mode_and_its_fake(channels_last):
    t = problem(channels_last=channels_last)
    expected = dora_conv(**t, scaling=1.5, padding=1)
    with torch.inference_mode():
        y = dora_conv(**{k: v.clone() for k, v in t.items()}, scaling=1.5, padding=1)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    with torch.inference_mode():
        mode = torch._subclasses.FakeTensorMode()
        fakes = {k: mode.from_tensor(v.clone()) for k, v in t.items()}
        with mode:
            fake = dora_conv(**fakes, scaling=1.5, padding=1)
    assert (fake.shape, fake.stride()) == (y.shape, y.stride())


def test_constants_get_no_gradient():
    constants_get_no_gradient(partial(dora_conv, scaling=1.5), problem, 8)


def test_a_norm_that_is_overwritten_before_backward():
    t = problem()
    norm, gain = norm_of(t)
    y = dora_conv(**t, norm=norm, gain=gain, scaling=1.5)
    gain.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_graph_without_need():
    makes_no_graph_without_need(partial(dora_conv, scaling=1.5), problem)


def test_weight_gets_no_gradient():
    t = problem()
    t["weight"].requires_grad_()
    dora_conv(**t, scaling=1.5).sum().backward()
    assert t["x"].grad is not None and t["weight"].grad is None


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_saves_the_base_result_where_the_magnitude_needs_it(magnitude, parameters):
    t = as_parameters(problem()) if parameters else problem()
    t["magnitude"].requires_grad_(magnitude)
    saved = seen_by_hooks(partial(dora_conv, **t, scaling=1.5))
    weight_A_B = [(8, 12, 3, 2), (4, 12, 3, 2), (8, 4, 1, 1)]
    x_h = [(3, 12, 9, 8), (3, 4, 7, 7)]
    assert saved == x_h + [(3, 8, 7, 7)] * magnitude + weight_A_B * (not parameters)


def test_backward_again_needs_retain_graph():
    t = problem()
    backward_again_needs_retain_graph(dora_conv(**t, scaling=1.5), [t[n] for n in NAMES])


def test_second_and_forward_derivatives_are_refused():
    t = problem()
    refuses_second_and_forward_derivatives(lambda x: dora_conv(**{**t, "x": x}, scaling=1.5), t["x"])


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_autograd(groups):
    t = problem(groups=groups)

    def gradients(y):
        return dict(zip(NAMES, torch.autograd.grad(y.sum(), [t[n] for n in NAMES]), strict=True))

    def forward():
        return dora_conv(**t, scaling=1.5, groups=groups, padding=1).relu()

    for results, expected in with_compiled_autograd(forward, gradients, t["lora_B"]):
        for name in NAMES:
            torch.testing.assert_close(results[name], expected[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_autocast_chooses_the_dtype_in_both_directions(device, groups):
    t = problem(device, groups)
    norm, gain = norm_of(t)
    half = {k: v.detach().bfloat16() if k in ("x", "weight") else v for k, v in t.items()}
    expected = dora_conv(**half, scaling=1.5, groups=groups, norm=norm, gain=gain)
    with torch.autocast(device, torch.bfloat16):
        y = dora_conv(**t, scaling=1.5, groups=groups)
        assert torch.equal(y, expected)
        wanted = [t[n] for n in NAMES[1:]]
        grads = torch.autograd.grad(y.float().square().sum(), wanted)
    for ours, other in zip(grads, torch.autograd.grad(expected.float().square().sum(), wanted), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, other)
