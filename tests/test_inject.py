"""DoraConfig chooses the same layers as PEFT's LoraConfig, with the same r and alpha, and starts them the same way."""

import copy

import pytest
import torch
from adapter_cases import ALL, IDS, Net, assert_same, expert_model
from torch import nn

from dora_ext import DoraConfig, inject
from dora_ext.injection import dora_layers
from dora_ext.testing import assert_close

CHOICES = {
    "ends": {"target_modules": ["q_proj", "embed"]},
    "paths": {"target_modules": ["model.layers.1.mlp.up_proj", "h.0.attn.k_proj", "q_proj"]},
    "longer ends": {"target_modules": ["mlp.up_proj", "1.attn.q_proj"]},
    "a set": {"target_modules": {"conv", "down_proj"}},
    "regular expression": {"target_modules": r"(model\.layers|h)\.[01]\.(attn|mlp)\..*_proj"},
    "expression for whole paths": {"target_modules": r".*q_proj"},
    "exclude ends": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.up_proj", "h.0.attn.q_proj"]},
    "exclude by expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"},
    "one layer": {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
    "no layers is all": {"target_modules": ["up_proj"], "layers_to_transform": []},
    "layers of a list": {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers of lists": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": ["nothing", "h"]},
    "experts by number": {"target_modules": ["up_proj"], "layers_to_transform": [2], "layers_pattern": "experts"},
    "a whole path has no layer": {"target_modules": ["h.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 3, r"h\.0\..*": 5}},
    "first that fits": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.\d\..*": 2, "up_proj": 7}},
    "anchored rank": {"target_modules": ["q_proj"], "rank_pattern": {"^q_proj": 3}},
    "rank within a name": {"target_modules": ["xq_proj", "q_proj"], "rank_pattern": {"q_proj": 3}},
    "alphas": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"h\.1\..*q_proj": 5, "k_proj": 1.5}},
    "ranks and alphas": {
        "target_modules": ["q_proj", "conv"], "use_rslora": True,
        "rank_pattern": {"conv": 3}, "alpha_pattern": {"conv": 9},
    },
}  # fmt: skip


def chosen_by_peft(model, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, r=4, lora_alpha=6, **options))
    return {
        name.removeprefix("base_model.model."): (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("case", CHOICES)
def test_same_choice_as_peft(case):
    model, options = expert_model(), CHOICES[case]
    theirs = chosen_by_peft(copy.deepcopy(model), options)
    inject(model, DoraConfig(r=4, alpha=6, **options))
    ours = {name: (m.r, m.alpha, m.scaling) for name, m in dora_layers(model).items()}
    assert ours == theirs
    assert ours


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
@pytest.mark.parametrize("options", [{}, {"exclude_modules": ["c_attn", "o_proj"]}], ids=str)
def test_all_linear_as_in_peft(kind, options):
    transformers = pytest.importorskip("transformers")
    if kind == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=2))
    else:
        sizes = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes))
    theirs = chosen_by_peft(copy.deepcopy(model), {"target_modules": "all-linear", **options})
    inject(model, DoraConfig(r=4, alpha=6, target_modules="ALL-linear", **options))
    assert {name: (m.r, m.alpha, m.scaling) for name, m in dora_layers(model).items()} == theirs


def test_short_form_is_the_config():
    model = expert_model()
    other = copy.deepcopy(model)
    options = {"r": 3, "alpha": 5, "dropout": 0.1, "use_rslora": True, "rank_pattern": {"k_proj": 2}}
    assert inject(model, (n for n in ["q_proj", "k_proj"]), **options) is model
    inject(other, DoraConfig(target_modules=["q_proj", "k_proj"], **options))
    assert [(n, repr(m)) for n, m in model.named_modules()] == [(n, repr(m)) for n, m in other.named_modules()]


def test_rest_is_frozen_and_starts_unchanged():
    model, x = Net(), IDS
    before = model(x)
    inject(model, DoraConfig(target_modules=ALL, r=2))
    assert_same(model(x), before, 1e-6)
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


# How A and B start.

KINDS = {
    "linear": lambda: nn.Linear(256, 512),
    "conv": lambda: nn.Conv2d(32, 512, 3),
    "embedding": lambda: nn.Embedding(256, 512),
}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_init_lora_weights_as_in_peft(kind, init):
    """The same distributions: zeros where PEFT has them, the same deviation, and the same tails (normal or uniform)."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(KINDS[kind]())
    lora = peft.LoraConfig(use_dora=True, r=32, lora_alpha=32, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(model), lora).base_model.model[0]
    ours = inject(model, DoraConfig(r=32, alpha=32, target_modules=["0"], init_lora_weights=init))[0]
    names = [n for n, _ in ours.named_parameters() if "lora_" in n]
    theirs_by_name = dict(theirs.named_parameters())
    for name in names:
        a, b = dict(ours.named_parameters())[name].detach(), theirs_by_name[name].detach()
        assert a.shape == b.shape
        assert bool(a.any()) == bool(b.any()), name
        if "magnitude" not in name and b.any():
            assert abs(a.mean()) < 0.05 * b.std()
            assert abs(a.std() / b.std() - 1) < 0.05
            assert abs(a.pow(4).mean() / a.pow(2).mean() ** 2 - b.pow(4).mean() / b.pow(2).mean() ** 2) < 0.25
    # m starts as |W + s B A|, whatever these are: the gain is 1.
    assert_close(ours.magnitude.flatten(), ours.weight_norm(), 1e-6)


def test_random_start_is_plain_lora():
    layer = inject(nn.Sequential(nn.Linear(12, 10)).double(), DoraConfig(r=3, alpha=6, init_lora_weights=False))[0]
    x = torch.randn(5, 12, dtype=torch.float64)
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert delta.norm() > 0.1
    assert_close(layer(x), layer.base_layer(x) + x @ delta.T, 1e-12)
