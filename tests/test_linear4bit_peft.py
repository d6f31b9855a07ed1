"""QDoRA as PEFT's users have it, on our kernels: errors beside PEFT's own, and how often a weight is dequantised."""

import copy

import pytest
import torch
from nf4_cases import Dequantisations
from test_linear4bit import linear4bit
from torch import Tensor, nn

from dora_ext import DoraLinear, reference
from dora_ext.nn import DoraLinearLayer
from dora_ext.nn.base_weight import dense_weight
from dora_ext.testing import assert_close, doubles, relative_error

peft = pytest.importorskip("peft")
from dora_ext.integrations.peft import disable, enable  # noqa: E402

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
TRAINED = ("lora_magnitude_vector.default.weight", "lora_A.default.weight", "lora_B.default.weight")


@pytest.fixture
def on_our_kernels():
    enable()
    yield
    disable()


def peft_layer(base: nn.Module, dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.2)
        layer.get_parameter(TRAINED[0]).mul_(torch.rand(64) + 0.5)
    for name in TRAINED:
        layer.get_parameter(name).data = layer.get_parameter(name).data.to(dtype)
    return layer


def step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *map(layer.get_parameter, TRAINED)], grad_y)]


def truth(layer: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """In float64, the dequantised weight being the truth."""
    t = doubles({n: layer.get_parameter(n) for n in TRAINED} | {"x": x.detach().requires_grad_()})
    m, A, B = (t[n] for n in TRAINED)
    weight, bias = dense_weight(layer.base_layer).double(), layer.base_layer.bias.double()
    y = reference.linear(t["x"], weight, A, B, m, 1.5, bias)
    return [y.detach(), *torch.autograd.grad(y, [t["x"], m, A, B], grad_y.double())]


@NESTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_not_above_those_of_peft(bnb, dtype, double_quant):
    x, grad_y = torch.randn(64, 256).to(dtype), torch.randn(64, 64).to(dtype)
    base = linear4bit(bnb, double_quant, dtype=dtype, n_in=256, compute_dtype=dtype)
    theirs = peft_layer(base, dtype)
    ours = DoraLinear.from_base(base, r=4, alpha=6, adapter_dtype=dtype)
    ours.load_state_dict({n: theirs.get_parameter(n) for n in TRAINED}, strict=False)
    expected = truth(theirs, x, grad_y)
    errors = [[*map(relative_error, step(layer, x, grad_y), expected)] for layer in (ours, theirs)]
    for name, mine, other in zip(("y", "dX", "dm", "dA", "dB"), *errors, strict=True):
        # Below half an ulp of float32 who is ahead is a matter of chance.
        assert mine <= max(1.05 * other, 3e-7), (name, errors)


@NESTED
def test_a_training_step_dequantises_twice(bnb, on_our_kernels, double_quant):
    base = linear4bit(bnb, double_quant, compute_dtype=torch.float32)
    layer, x, grad_y = peft_layer(base, torch.float32), torch.randn(12, 128), torch.randn(12, 64)
    with Dequantisations() as seen:
        results = step(layer, x, grad_y)
    assert seen.count == 2
    for ours, expected in zip(results, truth(layer, x, grad_y), strict=True):
        assert_close(ours, expected, 1e-6)
    cache = layer.lora_magnitude_vector["default"].norm_cache
    step(layer, x, grad_y)
    assert cache.computed == 1
    with torch.no_grad():
        layer.lora_A["default"].weight.data.mul_(2)
    for ours, expected in zip(step(layer, x, grad_y), truth(layer, x, grad_y), strict=True):
        assert_close(ours, expected, 1e-6)


def test_dropout_as_in_peft(bnb):
    base = linear4bit(bnb, compute_dtype=torch.float32)
    layer, x, grad_y = peft_layer(base, torch.float32, dropout=0.5), torch.randn(5, 128), torch.randn(5, 64)
    results = []
    for switch in (disable, enable):
        switch()
        torch.manual_seed(5)
        with Dequantisations() as seen:
            results.append(step(layer, x, grad_y))
    disable()
    assert seen.count == 2
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_the_layer_with_a_base_result_needs_the_norm_alone(bnb):
    base = linear4bit(bnb, compute_dtype=torch.float32)
    lora_A, lora_B = nn.Linear(128, 4, bias=False), nn.Linear(4, 64, bias=False)
    layer, x = DoraLinearLayer(fan_in_fan_out=False), torch.randn(5, 128)
    layer.update_layer(base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight, scaling=1.5)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(64) + 0.5)
    base_result = base(x)
    with Dequantisations() as seen:
        delta = layer(x, lora_A=lora_A, lora_B=lora_B, scaling=1.5, base_layer=base, base_result=base_result)
        again = layer(x, lora_A=lora_A, lora_B=lora_B, scaling=1.5, base_layer=base, base_result=base_result)
    assert seen.count == 0 and layer.norm_cache.computed == 1 and torch.equal(again, delta)
    t = doubles({"A": lora_A.weight, "B": lora_B.weight, "m": layer.weight, "x": x})
    expected = reference.linear(t["x"], dense_weight(base).double(), t["A"], t["B"], t["m"], 1.5, base.bias.double())
    assert_close(base_result + delta, expected, 1e-6)
