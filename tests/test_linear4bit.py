"""DoraLinear over bitsandbytes' own layers: as they are, saved and loaded, reordered, damaged; errors beside PEFT's."""

import copy
import io

import pytest
import torch
from nf4_cases import norm_tolerance, same_bits
from test_linear_nf4 import kept
from test_nf4_linear import run
from torch import nn

from dora_ext import DoraLinear, reference
from dora_ext.nn.base_weight import dense_weight, packed_weight
from dora_ext.ops import dequantize_nf4, quantize_nf4
from dora_ext.testing import assert_close, doubles, relative_error

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
# bitsandbytes warns about torch.compile and the like; nothing of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def linear4bit(bnb, double_quant=True, *, quant_type="nf4", dtype=torch.float32, device="cpu", n_in=128, **options):
    base = bnb.nn.Linear4bit(n_in, 64, compress_statistics=double_quant, quant_type=quant_type, **options)
    base.load_state_dict(nn.Linear(n_in, 64, dtype=dtype).state_dict())
    return base.to(dtype).to(device)


def wrap(base: nn.Module, **options) -> DoraLinear:
    layer = DoraLinear.from_base(base, r=4, alpha=6, **options)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.2)
        layer.magnitude.mul_(torch.rand(64, device=layer.magnitude.device) + 0.5)
    return layer


def exact(layer: DoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The reference in float64, over the weight as dora_ext reads it."""
    A, B = layer._factors()
    t = doubles({"x": x, "A": A, "B": B, "m": layer.magnitude})
    bias = None if layer.bias is None else layer.bias.double().cpu()
    weight = dense_weight(layer.base_layer).double().cpu()
    return reference.linear(t["x"], weight, t["A"], t["B"], t["m"], layer.scaling, bias)


@NESTED
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_it_is(bnb, device, dtype, compute_dtype, double_quant):
    base = linear4bit(bnb, double_quant, dtype=dtype, device=device, compute_dtype=compute_dtype)
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    layer = wrap(base)
    assert same_bits(dense_weight(base), weight)
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 128, device=device, dtype=x_dtype)
        y = layer(x)
        half = torch.bfloat16 in (compute_dtype, x_dtype)
        assert y.dtype == x_dtype
        assert_close(y, exact(layer, x), 1e-2 if half else norm_tolerance(device, dtype))


@NESTED
def test_keeps_the_packed_weight_and_reuses_the_norm(bnb, device, double_quant):
    base = linear4bit(bnb, double_quant, device=device, n_in=512, compute_dtype=torch.float32)
    layer, x = wrap(base), torch.randn(4, 512, device=device, requires_grad=True)
    q = packed_weight(base)
    inputs = [x, *layer.parameters(), *(v for v in q if isinstance(v, torch.Tensor))]
    assert kept(lambda: layer(x), *inputs) < 16 * 64 * 4 < 64 * 512
    for _ in range(3):
        run(layer, x)
    assert layer.norm_cache.computed == 1


@NESTED
def test_saved_and_loaded(bnb, device, double_quant):
    base = linear4bit(bnb, double_quant, device=device)
    layer, x = wrap(base), torch.randn(3, 128, device=device)
    buffer = io.BytesIO()
    torch.save(base.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    loaded = bnb.nn.Linear4bit(128, 64, compress_statistics=double_quant, quant_type="nf4", device="meta")
    loaded.weight = bnb.nn.Params4bit.from_prequantized(
        data=state["weight"], quantized_stats=stats, device=device, module=loaded
    )
    loaded.bias = nn.Parameter(state["bias"])
    other = wrap(loaded)
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" in k}, strict=False)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@NESTED
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reordered_for_bitsandbytes_cpu_product(bnb, quant_type, double_quant):
    """What a forward of the base in eval mode does to it on a CPU with bfloat16 instructions: scales are rounded."""
    base, x = linear4bit(bnb, double_quant, quant_type=quant_type), torch.randn(3, 128)
    layer = wrap(base)
    before, weight = layer(x), dense_weight(base)
    base.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    after = dense_weight(base)
    assert after.dtype == torch.float32
    assert 0 < relative_error(after, weight) < 2**-8
    assert_close(layer(x), exact(layer, x), 1e-6)
    assert_close(layer(x), before, 2**-7)
    factors = (t.double() for t in layer._factors())
    assert_close(layer.weight_norm(), reference.weight_norm(after.double(), *factors, layer.scaling), 1e-6)
    base.state_dict()  # bitsandbytes puts it back for this
    assert relative_error(dense_weight(base), weight) < 2e-2


@NESTED
def test_packed_again(bnb, device, double_quant):
    base = linear4bit(bnb, double_quant, device=device, compute_dtype=torch.float32)
    layer, x = wrap(base), torch.randn(3, 128, device=device)
    with pytest.warns(UserWarning, match="packing the folded weight into 4 bits again adds an error of"):
        plain = layer.to_base(dequantize=False)
    assert type(plain) is bnb.nn.Linear4bit and plain.compute_dtype == torch.float32
    folded = layer.to_base().weight
    assert torch.equal(packed_weight(plain).packed, quantize_nf4(folded, 64, double_quant).packed)
    expected = nn.functional.linear(x, dequantize_nf4(packed_weight(plain)), layer.bias)
    assert_close(plain(x), expected, 1e-5)
    assert_close(DoraLinear.from_base(plain, r=2)(x), expected, 1e-5)
    with pytest.raises(ValueError, match="expected True for Linear4bit, which is not in NF4"):
        wrap(linear4bit(bnb, quant_type="fp4")).to_base(dequantize=False)


def test_refuses_damaged_states(bnb):
    def broken(**changes):
        base = linear4bit(bnb)
        for name, value in changes.items():
            setattr(base.weight.quant_state, name, value)
        return base

    table = linear4bit(bnb).weight.quant_state.code.flip(0)
    absmax = linear4bit(bnb).weight.quant_state.absmax
    bad = [
        ({"quant_type": "int4"}, ValueError, "expected quant_type nf4, got int4"),
        ({"code": table}, ValueError, "quant_state.code: it is not the table of NF4"),
        ({"absmax": absmax[1:]}, ValueError, r"absmax: expected 128 values for shape \(64, 128\), got 127"),
        ({"absmax": absmax.to("meta")}, ValueError, "quant_state.absmax: expected it on cpu, got meta"),
        ({"absmax": absmax.float()}, TypeError, "quant_state.absmax: expected uint8 when nested"),
        ({"state2": None}, ValueError, "quant_state.state2: missing, yet it is nested"),
        ({"offset": None}, TypeError, "quant_state.offset: expected a float tensor, got NoneType"),
        ({"blocksize": 128}, ValueError, "quant_state.absmax: expected 64 values"),
        ({"shape": torch.Size([64, 64])}, ValueError, "weight: expected 2048 bytes .* got 4096"),
        ({"shape": torch.Size([128, 64])}, ValueError, r"Linear4bit: quant_state.shape: expected \(64, 128\), got"),
    ]
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            DoraLinear.from_base(broken(**changes))
    with pytest.raises(ValueError, match="it has no quant_state"):
        DoraLinear.from_base(bnb.nn.Linear4bit(128, 64, quant_type="nf4"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_other_formats_through_their_own_dequantisation(bnb, kind, dropout):
    if kind == "fp4":
        base = linear4bit(bnb, quant_type="fp4", compute_dtype=torch.float32)
    else:
        base = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
        base.load_state_dict(nn.Linear(128, 64).state_dict())
        base = base.to("cpu")
        base.weight.data = base.weight.data  # bitsandbytes quantises int8 weights on arrival
        if base.weight.dtype != torch.int8:
            pytest.skip("this bitsandbytes quantises to 8 bits on GPUs alone")
    layer, x = wrap(base, dropout=dropout), torch.randn(4, 128, requires_grad=True)
    dense = nn.Linear(128, 64)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(base))
        dense.bias.copy_(base.bias)
    same = wrap(dense, dropout=dropout)
    same.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora" in k}, strict=False)
    torch.manual_seed(1)
    results = run(layer, x)
    torch.manual_seed(1)
    for name, value in run(same, x).items():
        assert_close(results[name], value, 1e-5, name)
    assert kept(lambda: layer.eval()(x), x, *layer.parameters()) < 16 * 64 * 4 < 64 * 128
