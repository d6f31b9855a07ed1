"""What DoraConfig and inject warn of and refuse; the model is then as it was."""

import warnings

import pytest
from adapter_cases import expert_model
from torch import nn

from dora_ext import DoraConfig, DoraLinear, inject
from dora_ext.injection import dora_layers


def test_unused_patterns_are_named():
    for option in ("rank_pattern", "alpha_pattern"):
        config = DoraConfig(target_modules=["q_proj"], **{option: {"q_proj": 2, "no_such": 3, "k_proj": 4}})
        with pytest.warns(RuntimeWarning, match=rf"{option}: \['no_such', 'k_proj'\] fit none of the chosen layers"):
            inject(expert_model(), config)


def test_unused_exclusion_is_named():
    with pytest.warns(UserWarning, match=r"exclude_modules: \['no_such'\] fits nothing"):
        inject(expert_model(), DoraConfig(target_modules=["q_proj"], exclude_modules=["no_such"]))


@pytest.mark.parametrize("shared", ["weight", "module"])
def test_shared_weights_are_named(shared):
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    if shared == "weight":
        model["head"].weight = model["embed"].weight
    else:
        model["head"] = model["embed"]
    with pytest.warns(UserWarning, match=r"embed and head share one weight: each adapter \(on embed\)"):
        inject(model, DoraConfig(target_modules=["embed"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)}), ["embed", "head"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["no_such"]}, r"target_modules: no layer of ModuleDict fits \['no_such'\]$"),
        ({"target_modules": "q_proj.*x"}, "target_modules: no layer of ModuleDict fits 'q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, r"fits \['q_proj'\], exclude_modules='\.\*'"),
        ({"target_modules": ["k"], "layers_to_transform": 7}, "layers_to_transform=7"),
        ({"target_modules": ["mlp", "q_proj"]}, r"target_modules: model\.layers\.0\.mlp is a ModuleDict"),
        ({"target_modules": ["conv"], "r": 3}, "conv: DoraConv2d: r: expected a multiple of groups=2"),
    ],
)  # fmt: skip
def test_refusal_leaves_the_model_alone(options, message):
    model = expert_model()
    model["conv"] = nn.Conv2d(4, 4, 3, groups=2)
    model["head"].requires_grad_(False)
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inject(model, DoraConfig(**options))
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == before


def test_attention_that_bypasses_its_projection_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"attention\.out_proj is a NonDynamicallyQuantizableLinear"):
        inject(model, ["out_proj"])


def test_a_second_injection_leaves_the_first_alone():
    model = expert_model()
    inject(model, ["q_proj"], r=2)
    first = dora_layers(model)
    inject(model, r".*_proj", r=3)
    assert all(dora_layers(model)[name] is layer for name, layer in first.items())
    assert not any(isinstance(m.base_layer, DoraLinear) for m in dora_layers(model).values())
    with pytest.raises(ValueError, match="no layer of ModuleDict fits"):
        inject(model, ["q_proj"])


def test_options_beside_a_config():
    with pytest.raises(TypeError, match="inject: r: given beside a DoraConfig"):
        inject(expert_model(), DoraConfig(), r=4)
    with pytest.raises(TypeError, match="lora_alpha"):
        inject(expert_model(), lora_alpha=4)
    with pytest.raises(TypeError, match="DoraConfig: target_modules: expected a string or a list of strings, got None"):
        inject(expert_model(), None)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": "8"}, TypeError, "r: expected a whole number, got '8'"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected it in \[0, 1\), got 1.0"),
        ({"use_rslora": 1}, TypeError, "use_rslora: expected True or False, got 1"),
        ({"target_modules": None}, TypeError, "target_modules: expected a string or a list of strings, got None"),
        ({"target_modules": ["a", 3]}, TypeError, r"target_modules: expected .*, got \['a', 3\]"),
        ({"target_modules": []}, ValueError, r"target_modules: expected at least one name and none empty, got \[\]"),
        ({"target_modules": ""}, ValueError, "target_modules: expected at least one name and none empty, got ''"),
        ({"target_modules": "a("}, ValueError, r"target_modules: 'a\(' is no regular expression: "),
        ({"exclude_modules": "*"}, ValueError, r"exclude_modules: '\*' is no regular expression: "),
        ({"exclude_modules": 3}, TypeError, "exclude_modules: expected a string or a list of strings, got 3"),
        ({"rank_pattern": ["a"]}, TypeError, r"rank_pattern: expected \{regular expression: value\}, got \['a'\]"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\]: expected whole numbers from 1, got 0"),
        ({"rank_pattern": {"a": 2.0}}, TypeError, r"rank_pattern\['a'\]: expected whole numbers from 1, got 2.0"),
        ({"rank_pattern": {"a[": 2}}, ValueError, r"rank_pattern: 'a\[' is no regular expression"),
        ({"alpha_pattern": {"a": "4"}}, TypeError, r"alpha_pattern\['a'\]: expected finite numbers, got '4'"),
        ({"alpha_pattern": {"a": float("inf")}}, ValueError, r"alpha_pattern\['a'\]: expected finite numbers, got inf"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform: expected a number or a list of numbers from 0"),
        ({"layers_to_transform": [-1]}, TypeError, r"layers_to_transform: .* from 0, got \[-1\]"),
        ({"layers_to_transform": 1}, ValueError, "layers_to_transform: works on a list of .*, got .*all-linear"),
        ({"layers_pattern": "h", "target_modules": ["a"]}, ValueError, "layers_pattern: 'h' needs layers_to_transform"),
        ({"layers_pattern": ["h("], "layers_to_transform": 1, "target_modules": ["a"]}, ValueError, "layers_pattern: "),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights: expected True, False or .*, got 'pissa'"),
    ],
)  # fmt: skip
def test_bad_fields(options, error, message):
    with pytest.raises(error, match=f"DoraConfig: {message}"):
        DoraConfig(**options)
