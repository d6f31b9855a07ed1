"""quantize_layers packs a model's linear layers in place, one after the other."""

import copy
import gc
import weakref

import pytest
import torch
from adapter_cases import IDS, Net
from nf4_cases import same_bits
from torch import nn

from dora_ext import (
    DoraConfig,
    DoraLinear,
    NF4Linear,
    inject,
    load_adapter,
    quantize_layers,
    quantize_nf4,
    save_adapter,
    unload,
)  # fmt: skip
from dora_ext.ops import dequantize_nf4
from dora_ext.testing import assert_close

LINEAR = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def packed_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


@pytest.mark.parametrize("double_quant, blocksize", [(True, 64), (False, 32)])
def test_packs_all_but_the_head(device, double_quant, blocksize):
    model = Net().to(device).eval()
    model.blocks[0]["up"].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    assert quantize_layers(model, double_quant=double_quant, blocksize=blocksize) is model
    assert packed_names(model) == LINEAR
    for name in LINEAR:
        layer, was = model.get_submodule(name), before.get_submodule(name)
        expected = quantize_nf4(was.weight, blocksize, double_quant)
        for ours, other in zip(layer.nf4.operands(), expected.operands(), strict=True):
            assert same_bits(ours, other) if isinstance(ours, torch.Tensor) else ours == other
        assert torch.equal(layer.bias, was.bias) and layer.bias.requires_grad == was.bias.requires_grad
        assert not layer.training
        x = torch.randn(3, was.in_features, device=device)
        assert_close(layer(x), nn.functional.linear(x, dequantize_nf4(expected), was.bias), 1e-6)


def test_adapters_over_it_train_and_travel(tmp_path):
    pytest.importorskip("safetensors")
    model = quantize_layers(Net())
    fresh = copy.deepcopy(model)
    before = [y.detach() for y in model(IDS)]
    inject(model, r=2)
    assert all(isinstance(model.get_submodule(n), DoraLinear) for n in LINEAR)
    for ours, expected in zip(model(IDS), before, strict=True):
        assert_close(ours, expected, 1e-6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(IDS)[1].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(IDS)[1] - before[1]).norm() > 1e-3 * before[1].norm()
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    for ours, expected in zip(fresh(IDS), model(IDS), strict=True):
        assert torch.equal(ours, expected)
    unload(model)
    assert packed_names(model) == LINEAR
    for ours, expected in zip(model(IDS), before, strict=True):
        assert torch.equal(ours, expected)


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights, alive = [weakref.ref(layer.weight) for layer in model], []
    from_linear = NF4Linear.from_linear

    def counted(*args):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return from_linear(*args)

    monkeypatch.setattr(NF4Linear, "from_linear", counted)
    quantize_layers(model)
    gc.collect()
    assert alive == [4, 3, 2, 1] and not any(weight() for weight in weights)


def test_chosen_layers():
    model = Net()
    quantize_layers(model, DoraConfig(target_modules=["up"], exclude_modules=["blocks.0.up"]))
    assert packed_names(model) == ["blocks.1.up"]
    first = model.blocks[1]["up"]
    quantize_layers(model, ("up", "lm_head"), blocksize=32)
    assert packed_names(model) == ["blocks.0.up", "blocks.1.up", "lm_head"]
    assert model.blocks[1]["up"] is first and first.blocksize == 64  # packed already: left as it is


def test_layers_that_keep_their_weight_the_other_way_round():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(40, 96)
    model = quantize_layers(nn.Sequential(copy.deepcopy(conv1d)))
    assert torch.equal(model[0].nf4.packed, quantize_nf4(conv1d.weight.T).packed)


@pytest.mark.parametrize(
    "targets, options, message",
    [
        ("all-linear", {"blocksize": 48}, "blocksize: expected a power of two from 32 to 4096, got 48"),
        (["up", "embed"], {}, "target_modules: embed: expected a linear layer, got Embedding"),
        (["up", "conv2"], {}, "target_modules: conv2: expected a linear layer, got Conv2d"),
        (["sideways"], {}, r"target_modules: no layer of Net fits \('sideways',\)"),
        (["sideways"], {"double_quant": False}, "no layer of Net fits"),
    ],
)
def test_refusals_leave_the_model_as_it_was(targets, options, message):
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        quantize_layers(model, targets, **options)
    assert dict(model.named_modules()) == before
