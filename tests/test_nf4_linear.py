"""DoraLinear over NF4 storage of its own: from_base(quantize="nf4"), moves, copies, files, merging."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from nf4_cases import norm_tolerance, same_bits
from torch import nn

from dora_ext import DoraLinear, NF4Linear, inject, load_adapter, reference, save_adapter, unload
from dora_ext.ops import dequantize_nf4, quantize_nf4
from dora_ext.testing import assert_close, doubles

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])


def make(double_quant=True, *, dtype=torch.float32, device="cpu", blocksize=64, bias=True, **options) -> DoraLinear:
    base = nn.Linear(96, 40, bias=bias, device=device, dtype=dtype)
    layer = DoraLinear.from_base(
        base, r=4, alpha=6, quantize="nf4", double_quant=double_quant, blocksize=blocksize, **options
    )
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.2)
        layer.magnitude.mul_(torch.rand(40, device=device) + 0.5)
    return layer


def run(layer: DoraLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    grads = torch.autograd.grad(y, [leaf, *trained.values()], grad_y)
    return {"y": y.detach(), **dict(zip(["x", *trained], grads, strict=True))}


def truth(layer: DoraLinear, x: torch.Tensor) -> torch.Tensor:
    A, B = layer._factors()
    t = doubles({"x": x, "A": A, "B": B, "m": layer.magnitude})
    weight = dequantize_nf4(layer.base_layer.nf4).double().cpu()
    bias = None if layer.bias is None else layer.bias.double().cpu()
    return reference.linear(t["x"], weight, t["A"], t["B"], t["m"], layer.scaling, bias)


@NESTED
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_from_base(device, blocksize, double_quant):
    base = nn.Linear(96, 40, device=device)
    before = base.weight.clone()
    layer = DoraLinear.from_base(base, r=4, quantize="nf4", double_quant=double_quant, blocksize=blocksize)
    expected = quantize_nf4(before, blocksize, double_quant)
    q = layer.base_layer.nf4
    for ours, other in zip(q.operands(), expected.operands(), strict=True):
        assert same_bits(ours, other) if isinstance(ours, torch.Tensor) else ours == other
    assert torch.equal(base.weight, before) and base.weight.requires_grad  # the layer itself is as it was
    assert layer.bias is base.bias and not layer.bias.requires_grad
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"
    }  # fmt: skip
    x = torch.randn(3, 96, device=device)
    assert_close(layer(x), nn.functional.linear(x, dequantize_nf4(q), base.bias), 1e-6)
    assert_close(layer.base_layer(x), layer(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_the_inputs_dtype(device, dtype):
    tolerance = {torch.bfloat16: 6e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    for own in (torch.float32, torch.bfloat16):
        layer = make(dtype=own, device=device)
        x = torch.randn(5, 96, device=device, dtype=dtype)
        assert layer(x).dtype == dtype
        assert_close(layer(x), truth(layer, x), max(tolerance, norm_tolerance(device, own)))


def test_dropout_follows_the_reference():
    layer, x = make(dropout=0.5), torch.randn(6, 96)
    torch.manual_seed(9)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(9)
    t = doubles(dict(zip("ABmxd", (*layer._factors(), layer.magnitude, x, dropped), strict=True)))
    weight = dequantize_nf4(layer.base_layer.nf4).double()
    expected = reference.linear_dropout(
        t["x"], t["d"], weight, t["A"], t["B"], t["m"], layer.scaling, layer.bias.double()
    )
    assert_close(layer(x), expected, 1e-6)
    assert_close(layer.eval()(x), truth(layer, x), 1e-6)


def test_conv1d_is_turned_first():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(40, 96)
    layer = DoraLinear.from_base(conv1d, r=4, quantize="nf4")
    assert not layer.fan_in_fan_out and layer.base_layer.nf4.shape == (40, 96)
    assert torch.equal(layer.base_layer.nf4.packed, quantize_nf4(conv1d.weight.T).packed)
    x = torch.randn(3, 96)
    assert_close(layer(x), conv1d(x), 0.15)


@NESTED
def test_dtype_changes_leave_packed_bytes_and_scales(double_quant):
    layer, x = make(double_quant), torch.randn(5, 96)
    expected, buffers = layer(x), {n: b.clone() for n, b in layer.named_buffers()}
    for change in ("half", "bfloat16", "double", "float"):
        getattr(layer, change)()
    layer.to(torch.bfloat16).type(torch.float16)
    layer.to("cpu", torch.float32)
    assert buffers.keys() == dict(layer.named_buffers()).keys()
    for name, buffer in layer.named_buffers():
        assert same_bits(buffer, buffers[name]), name
    assert layer.bias.dtype == layer.magnitude.dtype == torch.float32
    assert_close(layer(x), expected, 1e-2)  # the adapter went through half precision
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.cuda
def test_moves_between_devices():
    layer, x = make(), torch.randn(5, 96)
    expected = layer(x)
    assert_close(layer.cuda()(x.cuda()), expected, 1e-5)
    assert {b.device.type for b in layer.buffers()} == {"cuda"}
    assert_close(layer.cpu()(x), expected, 1e-6)


@NESTED
def test_copies_and_pickles(double_quant):
    layer, x = make(double_quant), torch.randn(5, 96)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other.base_layer.weight.zero_()
        assert torch.equal(layer(x), expected) and not torch.equal(other(x), expected)


@NESTED
def test_state_dict_and_safetensors(double_quant, tmp_path):
    torch_format = io.BytesIO()
    layer, x = make(double_quant), torch.randn(5, 96)
    state = layer.state_dict()
    nested = {"nested_absmax", "nested_code", "offset"} if double_quant else set()
    assert {k for k in state if "lora" not in k} == {f"base_layer.{n}" for n in {"weight", "absmax", "bias"} | nested}
    torch.save(state, torch_format)
    torch_format.seek(0)
    loads = [lambda: torch.load(torch_format, weights_only=True)]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(nn.Sequential(layer, make(double_quant)).state_dict(), tmp_path / "two.safetensors")
    loads.append(lambda: {
        k[2:]: v for k, v in safetensors.load_file(tmp_path / "two.safetensors").items() if k.startswith("0.")
    })  # fmt: skip
    for load in loads:
        other = make(double_quant)
        other(x)  # has its own norm in the cache
        other.load_state_dict(load())
        assert torch.equal(other(x), layer(x))


@NESTED
@pytest.mark.parametrize("assign", [False, True])
def test_meta_device(double_quant, assign):
    layer, x = make(double_quant), torch.randn(5, 96)
    with torch.device("meta"):
        empty = make(double_quant, device="meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(empty(x), layer(x))


def test_refuses_files_of_another_layout():
    layer = make()
    with pytest.raises(ValueError, match=r"base_layer.absmax: expected torch.uint8 .*nested.* got torch.float32"):
        layer.load_state_dict(make(False).state_dict())
    with pytest.raises(ValueError, match=r"base_layer.absmax: .*\(60,\) \(blocksize 64, nested\).*got .*\(120,\)"):
        layer.load_state_dict(make(blocksize=32).state_dict())
    dense = DoraLinear.from_base(nn.Linear(96, 40), r=4)
    with pytest.raises(ValueError, match=r"base_layer.weight: expected torch.uint8 of shape \(1920,\)"):
        layer.load_state_dict(dense.state_dict())


def test_refuses_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="quantize: expected \"nf4\" or None, got 'fp4'"):
        DoraLinear.from_base(nn.Linear(8, 8), quantize="fp4")
    with pytest.raises(ValueError, match="blocksize: expected a power of two from 32 to 4096, got 48"):
        DoraLinear.from_base(nn.Linear(8, 8), quantize="nf4", blocksize=48)
    with pytest.raises(ValueError, match="expected a layer with a dense weight, got NF4Linear"):
        DoraLinear.from_base(make().base_layer, quantize="nf4")
    with pytest.raises(TypeError, match=r"layer: expected torch\.nn\.Linear"):
        DoraLinear.from_base(nn.Conv1d(2, 2, 1), quantize="nf4")
    with pytest.raises(ValueError, match=r"weight: expected shape \(out, in\), got \(8,\)"):
        NF4Linear(quantize_nf4(torch.randn(8)))


@NESTED
def test_merge_and_to_base(double_quant):
    layer, x = make(double_quant), torch.randn(5, 96)
    expected, packed = layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert_close(layer(x), expected, 1e-5)
    layer.unmerge()
    assert torch.equal(layer(x), expected) and torch.equal(layer.base_layer.weight, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = layer.to_base()
    assert type(plain) is nn.Linear
    assert_close(plain(x), expected, 1e-5)
    with pytest.warns(UserWarning, match=r"adds an error of \d\.\d\de-02 \(\|packed - folded\| / \|folded\|\)") as seen:
        four_bit = layer.to_base(dequantize=False)
    assert type(four_bit) is NF4Linear and four_bit.nf4.nested == double_quant
    told = float(str(seen[0].message).split("error of ")[1].split()[0])
    weight = dequantize_nf4(four_bit.nf4)
    assert told == pytest.approx(((weight - plain.weight).norm() / plain.weight.norm()).item(), rel=1e-2)
    again = quantize_nf4(plain.weight, 64, double_quant)
    assert torch.equal(four_bit.weight, again.packed)
    assert four_bit.bias is not layer.bias and torch.equal(four_bit.bias, layer.bias)


def test_norms_are_reused_and_never_stale():
    layer, x = make(), torch.randn(5, 96)
    for _ in range(3):
        run(layer, x)
    assert layer.norm_cache.computed == 1
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    other = make().base_layer.state_dict()
    changes = [
        lambda: (layer(x).square().mean().backward(), optimizer.step()),
        lambda: layer.lora_A["default"].weight.data.add_(0.1),
        lambda: layer.base_layer.load_state_dict(other),
        lambda: layer.base_layer.weight.data.copy_(other["weight"].flip(0)),
        lambda: layer.double().float(),
    ]
    for change in changes:
        layer(x)
        change()
        assert_close(layer(x), truth(layer, x), 1e-6)
        assert_close(layer.weight_norm(), reference.weight_norm(
            dequantize_nf4(layer.base_layer.nf4).double(), *(t.double() for t in layer._factors()), layer.scaling
        ), 1e-6)  # fmt: skip


def test_looks():
    assert "NF4Linear(in_features=96, out_features=40, bias=True, blocksize=64, double_quant=True" in repr(make())


def test_compiles_whole():
    layer, x = make(), torch.randn(5, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for ours, expected in zip(
        *(torch.autograd.grad(f(x).square().sum(), leaves) for f in (compiled, layer)), strict=True
    ):
        assert_close(ours, expected, 1e-6)


def test_adapter_files_and_models(tmp_path):
    model, x = nn.Sequential(make(), nn.ReLU(), nn.Linear(40, 96)), torch.randn(5, 96)
    save_adapter(model, tmp_path)
    dense = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 96))
    load_adapter(dense, tmp_path)
    for name in ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"):
        assert torch.equal(dense[0].get_parameter(name), model[0].get_parameter(name))
    packed = model[0].base_layer
    expected = model(x)
    merged = unload(copy.deepcopy(model), merge=True)
    assert type(merged[0]) is nn.Linear
    assert_close(merged(x), expected, 1e-5)
    assert unload(model)[0] is packed
    inject(model, ["0"], r=4, alpha=6)
    assert model[0].base_layer is packed and model[0].quantised
    load_adapter(model, tmp_path)
    assert_close(model(x), expected, 1e-6)
