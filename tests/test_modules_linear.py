"""DoraLinear alone: constructor, transposed weights, quantised bases, what it refuses, what it keeps."""

import copy

import pytest
import torch
from module_cases import make_input, make_layer, run, train_a_little
from torch import nn

from dora_ext import DoraLinear, reference
from dora_ext.testing import DEVICES, assert_close, doubles


def truth(layer: DoraLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients by the reference, in float64, for `run`'s gradient of the output."""
    A, B = layer._factors()
    t = doubles({"x": x, "lora_A": A, "lora_B": B, "magnitude": layer.magnitude})
    y = reference.linear(
        t["x"], layer.weight.double(), t["lora_A"], t["lora_B"], t["magnitude"], layer.scaling,
        None if layer.bias is None else layer.bias.double(), layer.transposed,
    )  # fmt: skip
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    names = ["lora_magnitude_vector.default.weight", "lora_A.default.weight", "lora_B.default.weight"]
    grads = [t["magnitude"].grad, t["lora_A"].grad, t["lora_B"].grad]
    return {"output": y.detach(), "x": t["x"].grad, **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"fan_in_fan_out": True}, {"use_rslora": True}], ids=str)
def test_constructor(options):
    layer = train_a_little(DoraLinear(12, 10, r=4, alpha=6, dtype=torch.float64, **options))
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"}
    assert layer.scaling == (3.0 if options.get("use_rslora") else 1.5)
    assert layer.weight.shape == ((12, 10) if options.get("fan_in_fan_out") else (10, 12))
    assert (layer.in_features, layer.out_features) == (12, 10)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    results, expected = run(layer, x), truth(layer, x.requires_grad_())
    for key in expected:
        assert_close(results[key], expected[key], 1e-12, key)
    assert_close(layer.to_base()(x), results["output"], 1e-12)


def test_looks():
    layer = DoraLinear(12, 10, r=4, alpha=6, dropout=0.1)
    for part in ("r=4, alpha=6, dropout=0.1, use_rslora=False", "(base_layer): Linear(in_features=12, out_features=10"):
        assert part in repr(layer)
    layer.merge()
    assert "merged=True" in repr(layer)
    assert "in_features=12, out_features=10, bias=True" in repr(DoraLinear(12, 10, fan_in_fan_out=True))


def test_dropout_only_in_training():
    layer, x = make_layer("linear", dropout=0.5), make_input("linear")
    without = make_layer("linear")
    without.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), without(x))


def test_dropout_against_the_reference():
    layer, x = make_layer("linear", torch.float64, dropout=0.5), make_input("linear", torch.float64)
    torch.manual_seed(9)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(9)
    expected = reference.linear_dropout(
        x, dropped, layer.weight, *layer._factors(), layer.magnitude, layer.scaling, layer.bias
    )
    assert_close(layer(x), expected, 1e-12)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_magnitude_vector", "x"])
def test_frozen_parts_get_no_gradient(frozen):
    layer, x = make_layer("linear"), make_input("linear")
    expected = run(layer, x)
    layer.zero_grad()
    for name, p in layer.named_parameters():
        if name.startswith(frozen):
            p.requires_grad_(False)
    leaf = x.detach().requires_grad_(frozen != "x")
    y = layer(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float())
    for name, p in [*layer.named_parameters(), ("x", leaf)]:
        if name.startswith((frozen, "base_layer")):
            assert p.grad is None
        else:
            assert_close(p.grad, expected[name], 1e-6, name)


def test_wrong_inputs():
    layer = DoraLinear(12, 10)
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 12\).*got \[3, 11\]"):
        layer(torch.randn(3, 11))
    with pytest.raises(TypeError, match="x: expected the dtype of weight, Float, got Half"):
        layer(torch.randn(3, 12).half())
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="x: expected bfloat16, float16, float32 or float64"):
            layer(torch.ones(3, 12, dtype=dtype))


@pytest.mark.cuda
def test_wrong_device():
    layer = DoraLinear(12, 10).cuda()
    with pytest.raises((ValueError, RuntimeError), match="x: expected it on cuda:0"):
        layer(torch.randn(3, 12))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_linear4bit(quant_type, nested, device):
    """A 4-bit base: the layer does what it would with the unpacked weight; the packed one stays as it is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(
        64, 32, quant_type=quant_type, compute_dtype=torch.float32, compress_statistics=nested
    )
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    base = base.to(device)
    packed = base.weight.data.clone()
    layer = train_a_little(DoraLinear.from_base(base, r=4, alpha=6))
    assert layer.base_layer is base and {p.dtype for n, p in layer.named_parameters() if "lora" in n} == {torch.float32}
    dense = nn.Linear(64, 32).to(device)
    with torch.no_grad():
        dense.weight.copy_(bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state))
        dense.bias.copy_(base.bias)
    expected = DoraLinear.from_base(dense, r=4, alpha=6)
    adapter = {k: v for k, v in layer.state_dict().items() if "lora" in k}
    expected.load_state_dict(adapter, strict=False)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    results, truth = run(layer, x), run(expected, x)
    for key in truth:
        assert_close(results[key], truth[key], 1e-5, key)
    plain = layer.to_base()
    assert type(plain) is nn.Linear
    assert_close(plain(x), expected.to_base()(x), 1e-6)
    layer.merge()
    assert_close(layer(x), results["output"], 1e-5)
    layer.unmerge()
    assert torch.equal(base.weight.data, packed) and layer.weight is base.weight
    assert layer(x.detach().bfloat16()).dtype == torch.bfloat16
    assert_close(copy.deepcopy(layer)(x), results["output"], 1e-6)


def test_large_magnitudes_and_zero_magnitudes():
    """m = 0 with n > 0 is legal, and has a true gradient."""
    layer, x = make_layer("linear", torch.float64), make_input("linear", torch.float64)
    with torch.no_grad():
        layer.magnitude[:3] = torch.tensor([0.0, 1e-8, 1e4], dtype=torch.float64)
    results, expected = run(layer, x), truth(layer, x)
    for key in expected:
        assert_close(results[key], expected[key], 1e-7 if "magnitude" in key else 1e-12, key)
    float32 = copy.deepcopy(layer).float()
    for key, value in run(float32, x.float()).items():
        assert_close(value, expected[key], 1e-5, key)


@pytest.mark.cuda
def test_captured_graph_follows_training():
    """Every replay computes the norm of the weights as they are then."""
    layer = make_layer("linear", device="cuda").eval().requires_grad_(False)
    x = make_input("linear", device="cuda").detach()
    layer(x)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        y = layer(x)
    layer.lora_B["default"].weight.mul_(2)
    graph.replay()
    assert_close(y, layer(x), 1e-6)
