import pytest
import torch

from dora_ext import reference
from dora_ext.ops import dora_conv
from dora_ext.testing import DEVICES, TOLERANCE, assert_close, doubles

GRADIENTS = ["x", "lora_A", "lora_B", "magnitude", "bias"]
# spatial sizes, kernel, geometry, groups
CASES = [
    ((17,), (3,), {}, 1),
    ((16,), (5,), {"stride": 2, "padding": 3}, 2),
    ((9, 8), (3, 3), {"padding": 1}, 1),
    ((9, 8), (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, 4),
    ((8, 8), (1, 1), {}, 1),
    ((3, 3), (3, 3), {"padding": 1}, 1),  # more weights than inputs
    ((5, 4, 6), (3, 1, 2), {"stride": 2, "padding": 1}, 1),
]


def inputs(spatial, kernel, groups, dtype, device, param_dtype=None, channels_last=False):
    def draw(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)

    ones = [1] * len(kernel)
    t = {
        "x": draw(3, 12, *spatial),
        "weight": draw(8, 12 // groups, *kernel) / 6,
        "lora_A": draw(4, 12, *kernel, dtype=param_dtype or dtype) / 6,
        "lora_B": draw(8, 4 // groups, *ones, dtype=param_dtype or dtype),
        "magnitude": draw(1, 8, *ones, dtype=param_dtype or dtype).abs() + 0.5,
        "bias": draw(8, dtype=param_dtype or dtype),
    }
    if channels_last:
        t["x"] = t["x"].contiguous(memory_format=torch.channels_last)
        t["weight"] = t["weight"].contiguous(memory_format=torch.channels_last)
    return {k: v.requires_grad_(k != "weight") for k, v in t.items()}


def compare(t, geometry, groups, dtype, fn=dora_conv):
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in t.items()}
    y = fn(**leaves, scaling=1.5, groups=groups, **geometry)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(y.dtype).to(y.device)
    y.backward(grad_y)
    ref = doubles(t)
    ref_y = reference.conv(**ref, scaling=1.5, **geometry)
    ref_y.backward(grad_y.double().cpu())
    assert_close(y, ref_y, TOLERANCE[dtype], "y")
    for name in GRADIENTS:
        assert leaves[name].grad.dtype == t[name].dtype
        assert_close(leaves[name].grad, ref[name].grad, 1.5 * TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spatial", "kernel", "geometry", "groups"), CASES)
def test_output_and_gradients_match_the_reference(device, dtype, spatial, kernel, geometry, groups):
    compare(inputs(spatial, kernel, groups, dtype, device), geometry, groups, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device):
    torch._dynamo.reset()
    t = inputs((9, 8), (3, 3), 1, torch.float32, device)
    compare(t, {"padding": 1}, 1, torch.float32, torch.compile(dora_conv, fullgraph=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_once_for_all_sizes(device, groups):
    torch._dynamo.reset()
    compiled = torch.compile(dora_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((9, 8), (10, 12), (13, 7)):
        t = inputs(size, (3, 3), groups, torch.float32, device, channels_last=size[0] == 10)
        compare(t, {"stride": 2, "padding": 1}, groups, torch.float32, compiled)


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_and_wider_adapters(device):
    t = inputs((9, 8), (3, 3), 2, torch.float32, device, torch.float64, channels_last=True)
    y = dora_conv(**t, scaling=1.0, groups=2, padding=1)
    base = torch.nn.functional.conv2d(t["x"], t["weight"], groups=2, padding=1)
    assert y.stride() == base.stride()  # the layout that the convolution itself chose
    compare(t, {"padding": 1}, 2, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", [("x", "weight"), ("x",), ("weight",)])
@pytest.mark.parametrize("size", [(9, 8), (3, 3)])  # more inputs than weights, and fewer
def test_channels_last_in_one_group(device, dtype, which, size):
    t = inputs(size, (3, 3), 1, dtype, device, torch.float64)
    for name in which:
        t[name] = t[name].detach().contiguous(memory_format=torch.channels_last).requires_grad_(name != "weight")
    compare(t, {"padding": 1}, 1, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_by_name_and_mode(device, padding, mode, kernel):
    """torch.nn.Conv1d with the effective weight is the truth, for padding modes too."""
    t = inputs((11,), (kernel,), 1, torch.float64, device)
    y = dora_conv(**t, scaling=1.5, padding=padding, padding_mode=mode, dilation=2)
    plain = torch.nn.Conv1d(12, 8, kernel, padding=padding, padding_mode=mode, dilation=2, dtype=torch.float64)
    ref = {k: v.detach().cpu() for k, v in t.items()}
    effective = reference.effective_conv_weight(ref["weight"], ref["lora_A"], ref["lora_B"], 1.5)
    g = ref["magnitude"].flatten() / effective.flatten(1).norm(dim=1)
    with torch.no_grad():
        plain.weight.copy_(g[:, None, None] * effective)
        plain.bias.copy_(ref["bias"])
        assert_close(y, plain(ref["x"]), 1e-12)


def test_unbatched_and_empty():
    t = inputs((9, 8), (3, 3), 1, torch.float64, "cpu")
    y = dora_conv(**t, scaling=1.0)
    single = dora_conv(**{**t, "x": t["x"][1]}, scaling=1.0)
    assert_close(single, y[1], 1e-12)
    assert dora_conv(**{**t, "x": t["x"][:0]}, scaling=1.0).shape == (0, *y.shape[1:])


def test_output_may_be_overwritten_in_place():
    t = inputs((9, 8), (3, 3), 1, torch.float64, "cpu")
    grads = []
    for activation in (torch.relu, torch.relu_):
        leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in t.items()}
        activation(dora_conv(**leaves, scaling=1.0)).square().sum().backward()
        grads.append([leaves[k].grad for k in GRADIENTS])
    for a, b in zip(*grads, strict=True):
        assert_close(b, a, 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_only_what_is_asked_for(groups):
    t = inputs((9, 8), (3, 3), groups, torch.float64, "cpu")
    ref = doubles(t)
    reference.conv(**ref, scaling=1.0).square().sum().backward()
    for wanted in GRADIENTS:
        leaves = {k: v.detach().requires_grad_(k == wanted) for k, v in t.items()}
        dora_conv(**leaves, scaling=1.0, groups=groups).square().sum().backward()
        assert_close(leaves[wanted].grad, ref[wanted].grad, 1e-12, wanted)
        assert all(leaves[k].grad is None for k in GRADIENTS if k != wanted)


def test_bad_arguments_are_named():
    t = inputs((9, 8), (3, 3), 2, torch.float32, "cpu")
    for change, error, message in [
        ({"x": torch.randn(3, 11, 9, 8)}, ValueError, "x: expected shape"),
        ({"x": torch.randn(3, 12, 9, 8, dtype=torch.float64)}, TypeError, "x: expected the dtype of weight"),
        ({"lora_A": torch.randn(4, 6, 3, 3)}, ValueError, "lora_A: expected shape"),
        ({"lora_A": torch.randn(3, 12, 3, 3)}, ValueError, "divisible by groups=2"),
        ({"lora_B": torch.randn(8, 4, 1, 1)}, ValueError, "lora_B: expected shape"),
        ({"padding": "full"}, ValueError, "padding: expected numbers"),
    ]:
        with pytest.raises(error, match=message):
            dora_conv(**{**t, "scaling": 1.0, "groups": 2, **change})
