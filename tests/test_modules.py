"""What every whole layer does, whatever its type: equal PEFT and float64, merge, copy, change its dtype."""

import copy
import io
import pickle

import pytest
import torch
from module_cases import (
    ALL_BASES,
    BASES,
    ONE_OF_EACH,
    assert_same,
    dora_class,
    make_base,
    make_input,
    make_layer,
    peft_layer,
    run,
)
from torch import nn

from dora_ext import DoraEmbedding
from dora_ext.testing import DEVICES, assert_close


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_forward_and_gradients_as_in_peft(name, options):
    """PEFT's state_dict fits as it is, keys and shapes."""
    pytest.importorskip("peft")
    base, x = make_base(name), make_input(name)
    theirs = peft_layer(base, **options)
    ours = dora_class(base).from_base(base, r=4, alpha=6, **options)
    assert ours.base_layer is base and not any(p.requires_grad for p in base.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):  # the second time the norm comes from the cache
        assert_same(run(ours, x), run(theirs, x), 1e-5)
    theirs.merge()
    assert_close(ours.to_base().weight, theirs.base_layer.weight, 1e-6)
    theirs.unmerge()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL_BASES)
def test_against_float64(name, dtype, device):
    """Half-precision bases carry float32 adapters, whose gradients are float32."""
    layer = make_layer(name, dtype, device)
    x = make_input(name, dtype, device)
    truth_layer = copy.deepcopy(layer).double()
    if dtype == torch.float32:
        tolerance = 1e-5
    else:
        tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    truth = run(truth_layer, x.double() if x.is_floating_point() else x)
    for key, value in run(layer, x).items():
        assert value.dtype == (dtype if key in ("output", "x") else torch.float32)
        assert_close(value, truth[key], tolerance, key)


@pytest.mark.parametrize("name", ALL_BASES)
def test_weight_norm_and_merged_weight(name):
    """The plain layer's output is the DoRA layer's, and its rows have the lengths m."""
    layer, x = make_layer(name, torch.float64), make_input(name, torch.float64)
    plain = layer.to_base()
    assert type(plain) is type(layer.base_layer) and not {id(p) for p in plain.parameters()} & set(
        map(id, layer.parameters())
    )
    if name != "embedding max_norm":  # it scales the merged rows down again, as in PEFT
        assert_close(plain(x), layer(x), 1e-12)
    weight = plain.weight.T if layer.transposed else plain.weight.flatten(1)
    assert_close(weight.norm(dim=1), layer.magnitude.flatten().abs(), 1e-12)
    fresh = dora_class(layer.base_layer).from_base(layer.base_layer, r=8)
    base_weight = layer.base_layer.weight
    assert_close(
        fresh.weight_norm(), (base_weight.T if layer.transposed else base_weight).flatten(1).norm(dim=1), 1e-12
    )
    assert torch.equal(fresh.magnitude.flatten(), fresh.weight_norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL_BASES)
def test_merge_and_unmerge(name, dtype):
    layer, x = make_layer(name, dtype).eval(), make_input(name, dtype)
    before, weight, y = copy.deepcopy(layer.state_dict()), layer.weight, layer(x)
    layer.merge()
    assert layer.merged and layer.weight is not weight
    if name != "embedding max_norm":  # it scales the merged rows down again, as in PEFT
        assert_close(layer(x), y, 1e-5 if dtype == torch.float32 else 1e-2)
    assert list(layer.state_dict()) == list(before)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="to_base: the layer is merged"):
        layer.to_base()
    with pytest.raises(RuntimeError, match="load_state_dict: the layer is merged"):
        layer.load_state_dict(before)
    with pytest.raises(RuntimeError, match="reset_parameters: the layer is merged"):
        layer.reset_parameters()
    assert other.double()(x.double() if x.is_floating_point() else x).dtype == torch.float64
    layer.unmerge()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    assert layer.weight is weight
    if name != "embedding max_norm":
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_merge_leaves_tied_weights_alone():
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    layer = DoraEmbedding.from_base(embedding, r=2)
    nn.init.normal_(layer.lora_embedding_A["default"])
    before = head.weight.clone()
    layer.merge()
    assert torch.equal(head.weight, before) and head.weight is embedding.weight


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_starts_as_the_base_layer(name):
    """B A = 0 and m = n exactly: the output is the base layer's to the last rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        base, x = make_base(name, dtype), make_input(name, dtype)
        assert_close(dora_class(base).from_base(base)(x), base(x), 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_copies_have_the_same_results(name):
    layer, x = make_layer(name, dropout=0.3), make_input(name)
    expected = run(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = dora_class(layer.base_layer).from_base(make_base(name), r=4, alpha=6, dropout=0.3)
    fresh.load_state_dict(layer.state_dict())
    for other in (
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), fresh,
    ):  # fmt: skip
        assert_same(run(other, x), expected, 0)
        assert other.norm_cache is not layer.norm_cache and other.weight is not layer.weight


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dtype_moves(name):
    layer = make_layer(name)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        results = run(layer, make_input(name, dtype))
        assert {t.dtype for t in results.values()} == {dtype}
    assert {p.dtype for p in layer.half().parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_adapter_dtype(name):
    base = make_base(name, torch.bfloat16)
    for adapter_dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        layer = dora_class(base).from_base(base, adapter_dtype=adapter_dtype)
        assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {expected}
