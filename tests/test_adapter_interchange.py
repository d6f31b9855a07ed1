"""DoraConfig's every field through files: real PEFT loads what we save, we load what it saves, outputs are equal."""

import copy
import json
import warnings

import pytest
import torch
from adapter_cases import ALL, IDS, Net, assert_same, edit_config, move

from dora_ext import DoraConfig, inject, load_adapter, merge, save_adapter, trainable_parameters, unload
from dora_ext.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from dora_ext.injection import dora_layers

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


def net():
    return Net()


def gpt2():
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config)


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


CASES = {
    "all kinds of layers": (net, {"target_modules": ALL}),
    "all kinds, rsLoRA": (net, {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        net, {"target_modules": ALL, "rank_pattern": {"embed": 3, r"blocks\.0\..*": 1, "conv2": 5},
              "alpha_pattern": {"conv.": 2.5, "^embed": 7}}),
    "patterns, rsLoRA": (
        net, {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"up": 4}, "alpha_pattern": {"1.up": 1}}),
    "expression": (net, {"target_modules": r"blocks\.1\..*|conv3"}),
    "excluded": (net, {"target_modules": ["up", "down", "conv1"], "exclude_modules": ["blocks.0.up", "conv1"]}),
    "excluded by expression": (net, {"target_modules": ["up", "down"], "exclude_modules": r".*\.1\..*"}),
    "layers": (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    "layers of a list": (
        llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers",
                "rank_pattern": {"q_proj": 3}}),
    "all-linear": (llama, {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {r"h\.0\.attn\.c_attn": 9}}),
    "GPT-2 and its embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_proj"], "rank_pattern": {"wpe": 1}}),
    "embedding and projection": (llama, {"target_modules": ["embed_tokens", "k_proj"], "rank_pattern": {"k_proj": 4}}),
    "head": (llama, {"target_modules": ["lm_head", "o_proj"]}),
    "random start": (net, {"target_modules": ALL, "init_lora_weights": False}),
    "gaussian start": (llama, {"target_modules": ["up_proj"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


def outputs(model):
    y = model(IDS)
    return y if isinstance(y, tuple) else [y.logits]


def lora_config(r=2, alpha=3, **options):
    return peft.LoraConfig(use_dora=True, r=r, lora_alpha=alpha, **options)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set|.*save_embedding_layers|.*share one weight|Model has")
        yield


@pytest.mark.parametrize("case", CASES)
def test_ours_in_peft(case, tmp_path):
    make, options = CASES[case]
    fresh = make().eval()
    model = copy.deepcopy(fresh)
    base = outputs(model)
    inject(model, DoraConfig(r=2, alpha=3, **options))
    move(model)
    expected = outputs(model)
    assert (expected[-1] - base[-1]).norm() > 1e-3 * base[-1].norm()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path).eval()
    assert_same(outputs(theirs), expected)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()} == {
        n: (m.r, pytest.approx(m.scaling)) for n, m in dora_layers(model).items()
    }
    # And back into ours, plain and merged.
    again = load_adapter(copy.deepcopy(fresh), tmp_path)
    assert_same(outputs(again), expected, 1e-6)
    assert_same(outputs(merge(again)), expected)
    assert_same(outputs(unload(again, merge=True)), expected)


@pytest.mark.parametrize("case", CASES)
def test_peft_in_ours(case, tmp_path):
    make, options = CASES[case]
    fresh = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(fresh), lora_config(**options))
    expected = outputs(move(theirs).eval())
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(fresh), tmp_path)
    assert_same(outputs(ours), expected)
    assert {id(p) for p in trainable_parameters(ours)} == {id(p) for n, p in ours.named_parameters() if "lora_" in n}
    present = inject(copy.deepcopy(fresh), DoraConfig(r=2, alpha=3, **options))
    assert_same(outputs(load_adapter(present, tmp_path)), expected)
    assert_same(outputs(unload(ours)), outputs(fresh), 0)
    # What we save of it is loaded by PEFT again.
    save_adapter(present, tmp_path / "ours")
    assert_same(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "ours").eval()), expected)


def test_files_have_the_same_keys(tmp_path):
    model = Net()
    peft.get_peft_model(copy.deepcopy(model), lora_config(target_modules=ALL)).save_pretrained(tmp_path / "peft")
    save_adapter(inject(model, ALL, r=2, alpha=3), tmp_path / "ours")
    ours, theirs = (safetensors_torch.load_file(tmp_path / f / WEIGHTS_NAME) for f in ("ours", "peft"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    config = json.loads((tmp_path / "ours" / CONFIG_NAME).read_text())
    assert set(config) <= set(json.loads((tmp_path / "peft" / CONFIG_NAME).read_text()))


def test_tied_head(tmp_path):
    """An adapter on an embedding whose weight the head shares: the head keeps the plain weight, as in PEFT."""
    fresh = llama(tie_word_embeddings=True).eval()
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    theirs = peft.get_peft_model(copy.deepcopy(fresh), lora_config(target_modules=["embed_tokens"]))
    expected = outputs(move(theirs).eval())
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(fresh), tmp_path)
    assert_same(outputs(ours), expected)
    assert_same(outputs(unload(ours, merge=True)), expected)


def test_base_weights_in_the_file(tmp_path):
    """PEFT puts an embedding's or a head's own weight into the file if it has an adapter, and loads it from there."""
    fresh = llama().eval()
    theirs = peft.get_peft_model(copy.deepcopy(fresh), lora_config(target_modules=["lm_head"]))
    move(theirs)
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = safetensors_torch.load_file(tmp_path / WEIGHTS_NAME)
    assert key in tensors
    assert_same(outputs(load_adapter(copy.deepcopy(fresh), tmp_path)), outputs(theirs.eval()))
    safetensors_torch.save_file(tensors | {key: torch.ones(3, 8)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=rf"{key}: expected shape \(13, 8\), got \(3, 8\)"):
        load_adapter(copy.deepcopy(fresh), tmp_path)


# Options in adapter_config.json that are refused, and what the error names.
REFUSED = {
    "base changed": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' has changed the base"),
    "tied adapters": ({"ensure_weight_tying": True}, "options that dora_ext does not have: ensure_weight_tying"),
    "rank pattern": ({"rank_pattern": {"up": 0}}, r"DoraConfig: rank_pattern\['up'\]: expected whole numbers from 1"),
    "alpha pattern": ({"alpha_pattern": {"(": 1}}, r"DoraConfig: alpha_pattern: '\(' is no regular expression"),
    "targets": ({"target_modules": "*"}, r"DoraConfig: target_modules: '\*' is no regular expression"),
    "kind of targets": ({"target_modules": 7}, "DoraConfig: target_modules: expected a string or a list"),
    "dropout": ({"lora_dropout": 2}, r"DoraConfig: dropout: expected it in \[0, 1\), got 2"),
    "layers": ({"layers_to_transform": ["1"]}, "DoraConfig: layers_to_transform: expected a number or a list"),
    "nothing fits": ({"target_modules": ["no_such"]}, r"target_modules: no layer of the model fits \['no_such'\]"),
    "not a layer": ({"target_modules": ["blocks", "up"]}, "target_modules: blocks is a ModuleList"),
    "all excluded": ({"exclude_modules": ["up", "down"]}, "(?s)no layer of the model fits.*unknown key"),
}


def test_a_file_is_no_folder(tmp_path):
    safetensors_torch.save_file({"lora_unet_up.alpha": torch.ones(())}, tmp_path / "kohya.safetensors")
    with pytest.raises(AdapterError, match=r"load_adapter: .*expected PEFT's folder, got a file: perhaps load_kohya's"):
        load_adapter(Net(), tmp_path / "kohya.safetensors")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case, tmp_path):
    changes, message = REFUSED[case]
    model = Net()
    save_adapter(inject(copy.deepcopy(model), ["up", "down"], r=2), tmp_path)
    edit_config(tmp_path, **changes)
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path)
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == before
