"""The five layer classes in the place of PEFT's: same results, gradients, dtypes, shapes and caching."""

import copy

import pytest
import torch
from module_cases import (
    BASES,
    BASES_BEYOND_PEFT,
    ONE_OF_EACH,
    assert_same,
    make_base,
    make_input,
    make_layer,
    peft_layer,
    run,
)
from torch import nn

import dora_ext
from dora_ext.nn import layers
from dora_ext.testing import assert_close

pytest.importorskip("peft")


def with_our_layer(layer: nn.Module) -> nn.Module:
    """A copy of PEFT's LoRA layer whose magnitude lives in our class of the same name."""
    layer = copy.deepcopy(layer)
    theirs = layer.lora_magnitude_vector["default"]
    ours = getattr(dora_ext, type(theirs).__name__)(theirs.fan_in_fan_out)
    ours.weight = theirs.weight
    layer.lora_magnitude_vector["default"] = ours
    return layer


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_forward_and_gradients_as_in_peft(name, options):
    """Without dropout base_result is given, with it it isn't: both call forms."""
    theirs = peft_layer(make_base(name), **options)
    ours = with_our_layer(theirs)
    x = make_input(name)
    for _ in range(2):  # the second time the norm comes from the cache
        assert_same(run(ours, x), run(theirs, x), 1e-5)


@pytest.mark.parametrize("name", BASES)
def test_in_float64(name):
    theirs = peft_layer(make_base(name, torch.float64)).double()
    ours, x = with_our_layer(theirs), make_input(name, torch.float64)
    assert_same(run(ours, x), run(theirs, x), 1e-12)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
def test_without_base_result_and_by_hand(name):
    """The call forms themselves, outside PEFT's layers."""
    theirs = peft_layer(make_base(name))
    ours, x = with_our_layer(theirs), make_input(name)
    arguments = {
        "lora_A": theirs.lora_A["default"], "lora_B": theirs.lora_B["default"], "scaling": 1.5,
        "base_layer": theirs.base_layer,
    }  # fmt: skip
    for base_result in (None, theirs.base_layer(x)):
        delta, expected = (
            m.lora_magnitude_vector["default"](x, **arguments, base_result=base_result) for m in (ours, theirs)
        )
        assert_close(delta, expected, 1e-5)
    assert repr(ours.lora_magnitude_vector["default"]).startswith("lora.dora.Dora")


@pytest.mark.parametrize("name", BASES)
def test_update_layer(name):
    """m starts at the norm with B A as it stands, with PEFT's shape and dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for lora_dtype in {torch.float32, dtype}:
            theirs = peft_layer(make_base(name, dtype))
            if name.startswith("embedding"):
                A, B = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
            else:
                A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            magnitudes = []
            for layer in (theirs, with_our_layer(theirs)):
                dora = layer.lora_magnitude_vector["default"]
                dora.update_layer(
                    base_layer=theirs.base_layer,
                    lora_A=A.data.to(lora_dtype),
                    lora_B=B.data.to(lora_dtype),
                    scaling=1.5,
                )
                magnitudes.append(dora.weight)
            assert magnitudes[1].dtype == magnitudes[0].dtype and magnitudes[1].shape == magnitudes[0].shape
            assert magnitudes[1].requires_grad and isinstance(magnitudes[1], nn.Parameter)
            assert_close(magnitudes[1], magnitudes[0], 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d", "embedding", "conv2d"])
def test_weight_norm_and_lora_weight(name):
    theirs = peft_layer(make_base(name))
    pair = theirs.lora_magnitude_vector["default"], with_our_layer(theirs).lora_magnitude_vector["default"]
    if name == "embedding":
        factors = theirs.lora_embedding_A["default"].T, theirs.lora_embedding_B["default"].T
    else:
        factors = theirs.lora_A["default"], theirs.lora_B["default"]
    expected, ours = (dora.get_lora_weight(*factors) for dora in pair)
    assert_close(ours, expected, 1e-6)
    weight = theirs.base_layer.weight
    lora_weight = expected.detach().reshape(weight.shape) if name == "conv2d" else expected.detach()
    expected, ours = (dora.get_weight_norm(weight, lora_weight, scaling=1.5) for dora in pair)
    assert_close(ours, expected, 1e-6)


@pytest.mark.parametrize("name", BASES)
def test_merging_through_peft(name):
    theirs = peft_layer(make_base(name))
    ours, x = with_our_layer(theirs), make_input(name)
    for safe in (False, True):
        for layer in (ours, theirs):
            layer.merge(safe_merge=safe)
        assert_close(ours.base_layer.weight, theirs.base_layer.weight, 1e-6)
        assert_close(ours(x), theirs(x), 1e-5)
        for layer in (ours, theirs):
            layer.unmerge()
        assert_close(ours.base_layer.weight, theirs.base_layer.weight, 1e-5)


@pytest.mark.parametrize("name", BASES)
def test_half_precision_base_under_float32_adapters(name):
    """What PEFT trains by default. Both against float64; ours may not be further off than a few roundings."""
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        theirs = peft_layer(make_base(name, dtype))
        ours, x = with_our_layer(theirs), make_input(name, dtype)
        truth = run(copy.deepcopy(ours).double(), x.double() if x.is_floating_point() else x)
        results = run(ours, x)
        for key, value in results.items():
            assert value.dtype == (dtype if key in ("output", "x") else torch.float32)
            assert_close(value, truth[key], tolerance, key)


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d", "conv2d", "embedding"])
def test_autocast(name):
    theirs = peft_layer(make_base(name))
    ours, x = with_our_layer(theirs), make_input(name)
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = run(ours, x), run(theirs, x)
    assert_same(results, expected, 2e-2)


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d", "conv2d", "conv1d"])
def test_wrapped_adapters_are_called(name):
    """Hooks on lora_A and lora_B (FSDP works through them) run, and the result is the same."""
    theirs = peft_layer(make_base(name))
    ours, x = with_our_layer(theirs), make_input(name)
    called = []
    for part in (ours.lora_A, ours.lora_B):
        part["default"].register_forward_hook(lambda *_: called.append(1))
    assert_same(run(ours, x), run(theirs, x), 1e-5)
    assert len(called) >= 2


def test_a_feature_whose_weights_are_all_zero():
    """PEFT divides 0 by 0 there."""
    base = make_base("linear")
    with torch.no_grad():
        base.weight[4] = 0
    layer = peft_layer(base)
    with torch.no_grad():
        layer.lora_B["default"].weight[4] = 0
        layer.lora_magnitude_vector["default"].weight[4] = 0
    ours, x = with_our_layer(layer), make_input("linear")
    assert not torch.isfinite(layer(x)).all()
    for wrapped in (False, True):
        if wrapped:
            ours.lora_A["default"].register_forward_hook(lambda *_: None)
        results = run(ours, x)
        assert all(torch.isfinite(t).all() for t in results.values())
        assert torch.equal(results["output"][..., 4], base.bias[4].expand(3, 5))
        assert results["lora_magnitude_vector.default.weight"][4] == 0


@pytest.mark.parametrize("name", BASES_BEYOND_PEFT)
def test_convolutions_that_peft_gets_wrong(name):
    """Grouped norms, dilation, padding_mode: equal to our whole layers, which are tested against the reference."""
    whole = make_layer(name, torch.float64)
    layer = getattr(dora_ext, f"{type(whole).__name__}Layer")(False)
    layer.weight = nn.Parameter(whole.magnitude.detach().clone())
    x = make_input(name, torch.float64)
    base = whole.base_layer
    for base_result in (None, base(x)):
        delta = layer(
            x, lora_A=whole.lora_A["default"], lora_B=whole.lora_B["default"], scaling=whole.scaling, base_layer=base,
            base_result=base_result,
        )  # fmt: skip
        assert_close(base(x) + delta, whole(x), 1e-12)
    unbatched = layer(
        x[0], lora_A=whole.lora_A["default"], lora_B=whole.lora_B["default"], scaling=whole.scaling, base_layer=base
    )
    assert_close(unbatched, delta[0], 1e-12)


def test_peft_caching():
    """PEFT's switch: filled in eval mode only, cleared by a call without it and by train()."""
    from peft.helpers import DoraCaching

    for name in ("linear", "embedding", "conv2d"):
        ours, x = with_our_layer(peft_layer(make_base(name))), make_input(name)
        cache = ours.lora_magnitude_vector["default"]._dora_cache
        expected = ours(x)
        assert not cache
        ours.eval()
        with DoraCaching():
            assert torch.equal(ours(x), expected) and torch.equal(ours(x), expected)
            assert set(cache) == {"weight-norm-default"}
            with torch.no_grad():
                ours.base_layer.weight.mul_(2)
            stale = ours.lora_magnitude_vector["default"]._cache_get("weight-norm-default")
            ours(x)
            assert ours.lora_magnitude_vector["default"]._cache_get("weight-norm-default") is stale
        ours(x)
        assert not cache
        with DoraCaching():
            ours(x)
            ours.train()
            assert not cache
            ours(x)
            assert not cache


def test_our_own_caching_switch(monkeypatch):
    ours, x = with_our_layer(peft_layer(make_base("linear"))).eval(), make_input("linear")
    monkeypatch.setattr(layers, "ENABLE_DORA_CACHING", True)
    ours(x)
    assert ours.lora_magnitude_vector["default"]._dora_cache


def test_stale_norms():
    """Without caching switched on, whatever changes W, A or B is seen in the next forward."""
    theirs = peft_layer(make_base("embedding"))
    ours, x = with_our_layer(theirs), make_input("embedding")
    cache = ours.lora_magnitude_vector["default"].norm_cache
    ours(x), ours(x)
    assert cache.computed == 1  # although PEFT passes fresh views of its parameters each time
    for layer in (ours, theirs):
        layer.lora_embedding_B["default"].data.mul_(1.5)
        layer.base_layer.weight.data.mul_(0.5)
    assert_same(run(ours, x), run(theirs, x), 1e-5)


def test_linear4bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    base = base.to("cpu")
    theirs = peft_layer(base)
    ours = with_our_layer(theirs)
    x = torch.randn(5, 64)
    assert_same(run(ours, x), run(theirs, x), 1e-5)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    pair = ours.lora_magnitude_vector["default"], theirs.lora_magnitude_vector["default"]
    for dora in pair:
        dora.update_layer(base_layer=base, lora_A=A, lora_B=B, scaling=1.5)
    assert_close(pair[0].weight, pair[1].weight, 1e-6)


def test_meta_device_and_place_on_cpu():
    layer = dora_ext.DoraLinearLayer(False)
    layer.update_layer(
        base_layer=nn.Linear(6, 4, device="meta"), lora_A=torch.empty(2, 6, device="meta"),
        lora_B=torch.empty(4, 2, device="meta"), scaling=1.0,
    )  # fmt: skip
    assert layer.weight.is_meta and layer.weight.shape == (4,)
    layer.update_layer(
        base_layer=nn.Linear(6, 4), lora_A=torch.randn(2, 6), lora_B=torch.randn(4, 2), scaling=1.0, place_on_cpu=True
    )
    assert layer.weight.device.type == "cpu"


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_compiled(name, options):
    """PEFT's layer with ours inside, in one graph."""
    torch._dynamo.reset()
    ours, x = with_our_layer(peft_layer(make_base(name), **options)), make_input(name)
    expected = run(ours, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = {k.removeprefix("_orig_mod."): v for k, v in run(compiled, x).items()}
    if not options:
        assert_same(results, expected, 1e-5)
    ours.eval()
    assert_close(compiled(x), ours(x), 1e-5)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "conv1d grouped"])
def test_a_scaling_that_is_a_tensor(name):
    """As peft.utils.hotswap makes it, so that another value needs no new graph: never read as a number."""
    layer, x = with_our_layer(peft_layer(make_base(name))), make_input(name)
    expected = run(layer, x)
    scaling = layer.scaling["default"]
    layer.scaling["default"] = torch.tensor(scaling)
    assert_same(run(layer, x), expected, 1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x), 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_float8_weights(dropout):
    """Norm and delta are those of the values; the base product is whoever's that made such a weight."""
    layer = with_our_layer(peft_layer(nn.Linear(12, 10), dropout=dropout))
    rounded = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
    layer.base_layer.weight.data = rounded.float()
    arguments = {"lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"], "scaling": 1.5}
    dora, x = layer.lora_magnitude_vector["default"], torch.randn(3, 12)
    base_result = None if dropout else layer.base_layer(x)
    expected = dora(x, base_layer=layer.base_layer, base_result=base_result, **arguments)
    layer.base_layer.weight = nn.Parameter(rounded, requires_grad=False)
    assert_close(dora(x, base_layer=layer.base_layer, base_result=base_result, **arguments), expected, 1e-6)
