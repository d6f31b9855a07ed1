"""DoraConv1d, 2d, 3d alone: geometry and groups against the reference, what they refuse."""

import pytest
import torch
from module_cases import ALL_BASES, make_input, make_layer, run, train_a_little
from torch import nn
from torch.func import functional_call

from dora_ext import DoraConv1d, DoraConv2d, DoraConv3d, reference
from dora_ext.testing import assert_close

CONVOLUTIONS = [name for name in ALL_BASES if name.startswith(("conv1d", "conv2d", "conv3d"))]


def expected_results(layer, x):
    """By the definition: torch's own convolution with the dense effective kernel, times g, plus the bias."""
    base = layer.base_layer
    dense = type(base)(
        base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation, 1, False,
        base.padding_mode, dtype=torch.float64,
    )  # fmt: skip
    A, B = (t.detach().clone().requires_grad_() for t in layer._factors())
    m, x = layer.magnitude.detach().clone().requires_grad_(), x.detach().requires_grad_()
    kernel = reference.effective_conv_weight(base.weight, A, B, layer.scaling)
    per_channel = (-1, *[1] * (base.weight.dim() - 2))
    g = reference.gain(m.flatten(), kernel.detach().flatten(1).norm(dim=1)).view(per_channel)
    y = g * functional_call(dense, {"weight": kernel}, x)
    if base.bias is not None:
        y = y + base.bias.view(per_channel)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    return {
        "output": y.detach(), "x": x.grad, "lora_A.default.weight": A.grad, "lora_B.default.weight": B.grad,
        "lora_magnitude_vector.default.weight": m.grad,
    }  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_against_the_definition(name):
    layer, x = make_layer(name, torch.float64), make_input(name, torch.float64)
    for given in (x, x[0]):  # with and without a batch dimension
        results, expected = run(layer, given), expected_results(layer, given)
        assert results.keys() == expected.keys()
        for key in expected:
            assert_close(results[key], expected[key], 1e-12, key)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dropout(name):
    """y = W x + bias + (g - 1) * W x_d + g * s B A x_d, from runs without dropout."""
    layer, x = make_layer(name, torch.float64, dropout=0.5), make_input(name, torch.float64)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    dropped = torch.nn.functional.dropout(x, 0.5)
    base = layer.base_layer
    layer.eval()
    assert_close(y, layer(dropped) + base(x) - base(dropped), 1e-12)


@pytest.mark.parametrize("cls, dims", [(DoraConv1d, 1), (DoraConv2d, 2), (DoraConv3d, 3)])
def test_constructor(cls, dims):
    options = {"stride": 2, "padding": 1, "groups": 2, "bias": False, "r": 4, "alpha": 6, "dtype": torch.float64}
    layer = train_a_little(cls(4, 6, 3, **options))
    assert layer.magnitude.shape == (1, 6, *[1] * dims)
    assert layer._factors()[0].shape == (4, 4, *[3] * dims) and layer._factors()[1].shape == (6, 2, *[1] * dims)
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    assert_close(layer(x), expected_results(layer, x)["output"], 1e-12)
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.stride) == (4, 6, 2, (2,) * dims)


def test_grouped_layers_merge_into_dense_ones():
    layer, x = make_layer("conv2d depthwise", torch.float64), make_input("conv2d depthwise", torch.float64)
    plain = layer.to_base()
    assert type(plain) is nn.Conv2d and plain.groups == 1 and plain.weight.shape == (8, 4, 3, 3)
    assert layer.base_layer.groups == 4 and layer.weight.shape == (8, 1, 3, 3)
    assert_close(plain(x), layer(x), 1e-12)


def test_channels_last():
    layer, x = make_layer("conv2d"), make_input("conv2d")
    expected = run(layer, x)
    results = run(layer.to(memory_format=torch.channels_last), x.detach().to(memory_format=torch.channels_last))
    for key in expected:
        assert_close(results[key], expected[key], 1e-5, key)


def test_wrong_inputs():
    layer = DoraConv2d(4, 6, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 4, 2 spatial sizes\), got \(2, 3, 8, 8\)"):
        layer(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 4, 2 spatial sizes\)"):
        layer(torch.randn(4, 8))
    with pytest.raises(TypeError, match=r"x: expected the dtype of weight, torch\.float32, got torch\.float16"):
        layer(torch.randn(2, 4, 8, 8).half())
    with pytest.raises(ValueError, match="r: expected a multiple of groups=2, got 5"):
        DoraConv2d(4, 6, 3, groups=2, r=5)
