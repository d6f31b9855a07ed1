"""Adapters on disk: to and from real PEFT."""

import copy

import pytest
import torch
from adapter_cases import ALL, IDS, Net, assert_same, move
from torch import nn

from dora_ext.adapter import WEIGHTS_NAME, load_adapter, save_adapter
from dora_ext.injection import dora_layers, inject, target_names

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def peft_model(net, **options):
    options = {"r": 2, "lora_alpha": 3, "target_modules": ALL} | options
    return peft.get_peft_model(net, peft.LoraConfig(use_dora=True, **options))


@pytest.mark.parametrize("targets", [ALL, "all-linear", ["up", "conv2"], r"blocks\.1\..*"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ours_in_peft(net, tmp_path, targets, use_rslora):
    fresh = copy.deepcopy(net)
    ours = move(inject(net, targets, r=3, alpha=5, use_rslora=use_rslora))
    save_adapter(ours, tmp_path, base_model_name="some/model")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    assert_same(theirs(IDS), ours(IDS))
    # No layer more and none less than ours has.
    modules = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(modules) == len(dora_layers(ours))


@pytest.mark.parametrize("targets", [ALL, ["up", "conv2"], r"blocks\.1\..*"])
@pytest.mark.parametrize("injected", [False, True])
def test_peft_in_ours(net, tmp_path, targets, injected):
    fresh = copy.deepcopy(net)
    theirs = move(peft_model(net, target_modules=targets))
    theirs.save_pretrained(tmp_path)
    if injected:
        inject(fresh, targets, r=2, alpha=3)
    load_adapter(fresh, tmp_path)
    assert_same(fresh(IDS), theirs(IDS))
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if "lora_" not in n)


def test_peft_in_ours_patterns(net, tmp_path):
    fresh = copy.deepcopy(net)
    theirs = move(
        peft_model(net, use_rslora=True, rank_pattern={"blocks.0.up": 3, "conv.": 1}, alpha_pattern={"down": 7})
    )
    theirs.save_pretrained(tmp_path)
    assert_same(load_adapter(fresh, tmp_path)(IDS), theirs(IDS))


def test_peft_layers_to_transform(net, tmp_path):
    fresh = copy.deepcopy(net)
    theirs = move(peft_model(net, target_modules=["up"], layers_to_transform=[1], layers_pattern="blocks"))
    theirs.save_pretrained(tmp_path)
    load_adapter(fresh, tmp_path)
    assert list(dora_layers(fresh)) == ["blocks.1.up"]
    assert_same(fresh(IDS), theirs(IDS))


def test_mixed_ranks_round_trip(net, tmp_path):
    fresh, third = copy.deepcopy(net), copy.deepcopy(net)
    inject(net, ["up"], r=2, alpha=4)
    inject(net, r"blocks\.0\.down", r=3, alpha=9, use_rslora=True)
    assert set(dora_layers(net)) == {"blocks.0.up", "blocks.1.up", "blocks.0.down"}
    save_adapter(move(net), tmp_path)
    assert_same(load_adapter(fresh, tmp_path)(IDS), net(IDS))
    assert_same(peft.PeftModel.from_pretrained(third, tmp_path)(IDS), net(IDS))


def test_gpt2_conv1d(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    fresh, third = copy.deepcopy(model), copy.deepcopy(model)
    inject(model, r=2)
    assert "lm_head" not in dora_layers(model)
    assert len(dora_layers(model)) == 4
    save_adapter(move(model), tmp_path, task_type="CAUSAL_LM")
    expected = model(IDS).logits
    assert_same([load_adapter(fresh, tmp_path)(IDS).logits], [expected])
    assert_same([peft.PeftModel.from_pretrained(third, tmp_path)(IDS).logits], [expected])


def test_embedding_weight_in_file(tmp_path):
    # PEFT puts a targeted embedding's own weight into the file of a transformers model.
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    fresh = copy.deepcopy(model)
    lora = peft.LoraConfig(use_dora=True, r=2, target_modules=["embed_tokens", "q_proj"])
    theirs = move(peft.get_peft_model(model, lora)).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    assert any("base_layer.weight" in key for key in safetensors_torch.load_file(tmp_path / WEIGHTS_NAME))
    assert_same([load_adapter(fresh, tmp_path)(IDS).logits], [theirs(IDS).logits])


def test_all_linear_leaves_head_and_attention_out(net):
    net.attention = nn.MultiheadAttention(4, 2)
    assert target_names(net) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")]


def test_inject_finds_nothing(net):
    before = {n: p.requires_grad for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"target_modules.*no_such"):
        inject(net, ["no_such"])
    assert {n: p.requires_grad for n, p in net.named_parameters()} == before


def test_loading_makes_norms_stale(net, tmp_path):
    fresh = copy.deepcopy(net)
    save_adapter(move(inject(net, ALL, r=2)), tmp_path)
    inject(fresh, ALL, r=2)
    fresh(IDS)  # norms are kept now
    assert_same(load_adapter(fresh, tmp_path)(IDS), net(IDS))


def test_compiled_model(net, tmp_path):
    fresh = copy.deepcopy(net)
    save_adapter(torch.compile(move(inject(net, ["up"], r=2))), tmp_path)
    compiled = torch.compile(fresh)
    assert load_adapter(compiled, tmp_path) is compiled
    assert_same(fresh(IDS), net(IDS))


def test_dtypes_survive(net, tmp_path):
    fresh = copy.deepcopy(net).bfloat16()
    save_adapter(move(inject(net, ["up"], r=2)), tmp_path)
    kinds = {n: p.dtype for n, p in inject(copy.deepcopy(fresh), ["up"], r=2).named_parameters()}
    load_adapter(fresh, tmp_path)
    assert {n: p.dtype for n, p in fresh.named_parameters()} == kinds
    saved = safetensors_torch.load_file(tmp_path / WEIGHTS_NAME)
    assert {v.dtype for v in saved.values()} == {torch.float32}
