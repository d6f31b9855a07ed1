"""Merging all layers of a model, taking them out again, and what an optimizer gets."""

import copy

import pytest
import torch
from adapter_cases import ALL, IDS, Net, assert_same, move
from torch import nn

from dora_ext import DoraConfig, DoraLinear, inject, merge, trainable_parameters, unload, unmerge
from dora_ext.injection import dora_layers


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def trained(net):
    return move(inject(net, DoraConfig(target_modules=ALL, r=2, alpha=3)))


def snapshot(model):
    return {n: (p, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_as_before(model, before):
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, flag, value) in before.items():
        assert after[name] is parameter and parameter.requires_grad == flag and torch.equal(parameter, value), name


def test_trainable_parameters(net):
    inject(net, ["up"], r=2)
    given = trainable_parameters(net)
    assert {id(p) for p in given} == {id(p) for n, p in net.named_parameters() if "lora_" in n}
    assert sum(p.numel() for p in given) == 2 * (2 * 6 + 10 * 2 + 10)
    optimizer = torch.optim.SGD(given, lr=0.1)
    before = [p.detach().clone() for p in given]
    net(IDS)[1].square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(given, before, strict=True))
    net.lm_head.requires_grad_(True)
    assert len(trainable_parameters(net)) == len(given) + 1


def test_merge_and_back(net):
    trained(net)
    before, expected = snapshot(net), net(IDS)
    assert merge(net) is net
    assert all(layer.merged for layer in dora_layers(net).values())
    assert_same(net(IDS), expected)
    assert merge(net) is net  # merged layers stay so
    assert unmerge(net) is net
    assert unmerge(net) is net
    assert_as_before(net, before)
    assert all(torch.equal(a, b) for a, b in zip(net(IDS), expected, strict=True))


def test_failed_merge_merges_nothing(net, monkeypatch):
    trained(net)

    def fail():
        raise MemoryError("no")

    monkeypatch.setattr(dora_layers(net)["conv3"], "merge", fail)
    net.embed.merge()
    with pytest.raises(MemoryError):
        merge(net)
    assert [name for name, layer in dora_layers(net).items() if layer.merged] == ["embed"]


@pytest.mark.parametrize("copied", [False, True])
def test_unload_brings_the_model_back(net, copied):
    net.blocks[0]["up"].weight.requires_grad_(False)  # was frozen before: stays so
    before, modules, expected = snapshot(net), dict(net.named_modules()), net(IDS)
    trained(net)
    assert not torch.allclose(net(IDS)[1], expected[1])
    if copied:
        net = copy.deepcopy(net)
    assert unload(net) is net
    assert all(torch.equal(a, b) for a, b in zip(net(IDS), expected, strict=True))
    assert {n: p.requires_grad for n, p in net.named_parameters()} == {n: flag for n, (_, flag, _) in before.items()}
    if not copied:
        assert_as_before(net, before)
        assert dict(net.named_modules()) == modules
    assert set(vars(net)) == set(vars(Net()))


def test_unload_merged(net):
    fresh = copy.deepcopy(net)
    before = snapshot(fresh)
    base_weight = net.conv2.weight
    trained(net)
    expected = net(IDS)
    net.conv1.merge()  # merged or not, all are kept
    assert unload(net, merge=True) is net
    assert not dora_layers(net)
    assert_same(net(IDS), expected)
    assert [(n, type(m)) for n, m in net.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert {n: (p.shape, p.requires_grad) for n, p in net.named_parameters()} == {
        n: (p.shape, flag) for n, (p, flag, _) in before.items()
    }
    # The weights from before are untouched, for whoever else has them.
    assert torch.equal(base_weight, fresh.conv2.weight) and net.conv2.weight is not base_weight
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh(IDS), expected)


def test_unload_merged_as_peft(net):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(use_dora=True, r=2, lora_alpha=3, target_modules=ALL)
    theirs = move(peft.get_peft_model(copy.deepcopy(net), config))
    trained(net)
    with torch.no_grad():
        for ours, other in zip(dora_layers(net).values(), _peft_layers(theirs), strict=True):
            ours.load_state_dict(other.state_dict())
    unload(net, merge=True)
    for (name, a), b in zip(net.named_parameters(), theirs.merge_and_unload().parameters(), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm(), name


def _peft_layers(model):
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def test_unload_would_lose_a_merged_adapter(net):
    trained(net)
    net.blocks[1]["up"].merge()
    with pytest.raises(ValueError, match=r"unload: blocks\.1\.up is merged: say merge=True to keep .* or call unmerge"):
        unload(net)
    assert len(dora_layers(net)) == 8
    unload(unmerge(net))
    assert not dora_layers(net)


def test_tied_weights():
    """The adapter changes its own layer alone, merged too; taken out, the weights are tied as before."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = weight = model["embed"].weight
    before, ids, x = weight.detach().clone(), torch.arange(5), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="share one weight"):
        inject(model, ["embed"], r=2)
    move(model)
    expected = model["embed"](ids)
    merge(model)
    assert_same([model["embed"](ids)], [expected])
    assert torch.equal(model["head"](x), x @ before.T) and torch.equal(weight, before)
    tied = copy.deepcopy(unmerge(model))
    unload(tied)
    assert tied["embed"].weight is tied["head"].weight and torch.equal(tied["embed"].weight, before)
    unload(model, merge=True)
    assert_same([model["embed"](ids)], [expected])
    assert model["head"].weight is weight and torch.equal(weight, before) and model["embed"].weight is not weight


def test_compiled_model(net):
    compiled = torch.compile(net, backend="eager")
    expected = net(IDS)
    assert inject(compiled, r"blocks\.0\..*", r=2) is compiled
    move(compiled)
    changed = net(IDS)
    assert list(dora_layers(net)) == ["blocks.0.up", "blocks.0.down"]
    assert_same(merge(compiled)(IDS), changed)
    unload(unmerge(compiled))
    assert_same(compiled(IDS), expected, 0)


@pytest.mark.parametrize("function", [merge, unmerge, unload])
def test_model_without_layers(net, function):
    with pytest.raises(ValueError, match=f"{function.__name__}: model: Net has no DoRA layer"):
        function(net)


def test_a_layer_is_no_model():
    with pytest.raises(ValueError, match="unload: model is itself a DoRA layer"):
        unload(DoraLinear(4, 3))
