"""Every whole layer at its limits: empty and strided inputs, zero and huge weights, bad arguments."""

import pytest
import torch
from module_cases import (
    ONE_OF_EACH,
    assert_same,
    make_input,
    make_layer,
    run,
)
from torch import nn

from dora_ext import DoraConv2d, DoraEmbedding, DoraLinear
from dora_ext.testing import assert_close


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d", "embedding"])
def test_empty_batch(name):
    layer = make_layer(name)
    x = make_input(name)[:0].detach().requires_grad_(not name.startswith("embedding"))
    y = layer(x)
    assert y.shape == layer.base_layer(x).shape
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d", "conv2d", "embedding"])
def test_noncontiguous_inputs(name):
    layer, x = make_layer(name), make_input(name).detach()
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    assert_same(run(layer, strided), run(layer, x), 1e-6)
    expanded = x[:1].expand_as(x)
    assert_close(layer(expanded), layer(expanded.contiguous()), 1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_zero_features(name):
    """n = 0: the output is the bias alone, m gets no gradient, nothing is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make_layer(name, dtype), make_input(name, dtype)
        weight, (_, lora_B) = layer.base_layer.weight, layer._factors()
        with torch.no_grad():
            weight[(slice(None), 2) if layer.transposed else 2] = 0
            lora_B[2] = 0
        results = run(layer, x)
        assert all(torch.isfinite(t).all() for t in results.values())
        y = results["output"].movedim(1, -1) if name.startswith("conv") else results["output"]
        bias = getattr(layer.base_layer, "bias", None)
        assert torch.equal(y[..., 2], (torch.zeros(()) if bias is None else bias[2]).to(dtype).expand_as(y[..., 2]))
        assert results["lora_magnitude_vector.default.weight"].flatten()[2] == 0
        layer.merge()
        assert torch.isfinite(layer(x)).all()


def test_huge_float16_weights_have_a_norm():
    """Sums of squares beyond 65504, which PEFT's float16 norm turns into infinity."""
    base = nn.Linear(64, 8).half()
    with torch.no_grad():
        base.weight.mul_(2000)
    layer = DoraLinear.from_base(base, r=2)
    assert_close(layer.weight_norm(), base.weight.double().norm(dim=1), 1e-6)
    assert torch.isfinite(layer(torch.randn(3, 64).half() / 100)).all()


@pytest.mark.parametrize("make", [lambda **o: DoraLinear(6, 4, **o), lambda **o: DoraConv2d(4, 6, 3, **o),
                                  lambda **o: DoraEmbedding(9, 4, **o)])  # fmt: skip
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": -3}, ValueError, "r: expected at least 1, got -3"),
        ({"r": 2.0}, TypeError, "r: expected a whole number, got 2.0"),
        ({"alpha": float("inf")}, ValueError, "alpha: expected a finite number, got inf"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        ({"alpha": "16"}, TypeError, "alpha: expected a number, got '16'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected it in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: expected it in \[0, 1\), got -0.1"),
        ({"dtype": torch.complex64}, TypeError, "expected a weight in .*, got torch.complex64"),
        ({"adapter_dtype": torch.int32}, TypeError, "adapter_dtype: expected a float dtype, got torch.int32"),
    ],
)
def test_bad_options(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_bases():
    for cls in (DoraLinear, DoraEmbedding, DoraConv2d):
        for layer in (nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 3), make_layer("linear")):
            with pytest.raises(TypeError, match=rf"{cls.__name__}: layer: expected .*, got {type(layer).__name__}"):
                cls.from_base(layer)
    integers = nn.Linear(4, 3)
    integers.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"expected a weight in .*, got torch.int8"):
        DoraLinear.from_base(integers)
    with pytest.raises(ValueError, match="not initialised yet"):
        DoraLinear.from_base(nn.LazyLinear(4))
    grouped = nn.Conv2d(4, 8, 3, groups=4)
    with pytest.raises(ValueError, match="r: expected a multiple of groups=4, got 6"):
        DoraConv2d.from_base(grouped, r=6)
    assert all(p.requires_grad for p in grouped.parameters())  # what was refused is as it was
