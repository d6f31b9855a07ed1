"""PEFT's models with enable() on and off: the same results, gradients, files; and the switch itself."""

import copy
import pickle
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from module_cases import BASES, ONE_OF_EACH, assert_same, make_base, make_input, peft_layer, run, train_a_little
from torch import nn

import dora_ext
import dora_ext.integrations.peft as integration
from dora_ext.integrations.peft import forwards
from dora_ext.nn import layers as our_layers
from dora_ext.testing import assert_close

peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def off():
    integration.disable()
    yield
    integration.disable()


class Model(nn.Module):
    """Every kind of layer that an adapter sits on, one after the other."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.second(torch.relu(self.first(x)))
        return self.head(x + self.conv(x.movedim(-1, 1)).movedim(1, -1))


TARGETS = ["embed", "first", "second", "conv"]


def make_model(adapters=("default",), base: nn.Module | None = None, **options):
    torch.manual_seed(5)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": TARGETS, "init_lora_weights": False, **options}
    )
    model = peft.get_peft_model(base or Model(), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    return train_a_little(model)


def activate(model: nn.Module, *adapters: str) -> None:
    model.base_model.set_adapter(list(adapters))
    for name, p in model.named_parameters():  # PEFT before 0.20 leaves magnitudes of inactive adapters trainable
        if "lora_" in name:
            p.requires_grad_(not set(name.split(".")).isdisjoint(adapters))


IDS = torch.tensor([[1, 5, 2, 2, 19, 0], [3, 3, 7, 8, 11, 4]])


def both(model: nn.Module, x=IDS, tolerance: float = 1e-5, fused: bool = True) -> None:
    """Output and all gradients of `model` with PEFT's code and with ours."""
    expected = run(model, x)
    expected = {name: t.clone() for name, t in expected.items()}
    with integration.enabled():
        before = forwards.calls["fused"]
        assert_same(run(model, x), expected, tolerance)
        assert (forwards.calls["fused"] > before) == fused


# --- the switch


def test_enable_and_disable_put_the_very_same_functions_back():
    from peft.tuners.lora import bnb, dora, layer, variants

    owners = [layer.Linear, layer.Embedding, layer._ConvNd, dora, variants, bnb]
    owners += [getattr(dora, name) for name in vars(dora) if name.endswith("Layer")]
    before = [dict(vars(owner)) for owner in owners]
    for _ in range(2):
        integration.enable()
        integration.enable()
        assert integration.is_enabled() and dora.DoraLinearLayer is variants.DoraLinearLayer is dora_ext.DoraLinearLayer
        integration.disable()
        integration.disable()
        assert not integration.is_enabled()
        for owner, old in zip(owners, before, strict=True):
            now = dict(vars(owner))
            assert now.keys() == old.keys() and all(now[name] is old[name] for name in old)


def test_enabled_restores_what_was_before():
    with integration.enabled():
        with integration.enabled():
            assert integration.is_enabled()
        assert integration.is_enabled()
    assert not integration.is_enabled()
    integration.enable()
    with pytest.raises(KeyError), integration.enabled():
        raise KeyError
    assert integration.is_enabled()


@pytest.mark.parametrize("version, fits", [("0.17.1", False), ("0.18.0", True), ("0.21.3.dev0", True), ("1.0", False)])
def test_versions(monkeypatch, version, fits):
    monkeypatch.setattr(peft, "__version__", version)
    if fits:
        integration.enable()
        return
    with pytest.raises(RuntimeError, match=rf"expected PEFT 0.18 to 0.21, found {version}; enable\(force=True\)"):
        integration.enable()
    assert not integration.is_enabled()
    integration.enable(force=True)
    assert integration.is_enabled()


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="PEFT is not installed"):
        integration.enable()


def test_a_failing_enable_leaves_nothing_behind(monkeypatch):
    from peft.tuners.lora import dora, layer

    before = layer.Linear.forward
    monkeypatch.delattr(dora, "DoraConv3dLayer")
    with pytest.raises(AttributeError):
        integration.enable()
    assert layer.Linear.forward is before and not integration.is_enabled()


def test_models_made_before_between_and_after():
    before = make_model()
    with integration.enabled():
        between = make_model()
    after = make_model()
    classes = [{type(m) for m in model.modules()} for model in (before, between, after)]
    assert our_layers.DoraLinearLayer in classes[1] and our_layers.DoraLinearLayer not in classes[0] | classes[2]
    expected = run(after, IDS)
    for model in (before, between):
        assert_same(run(model, IDS), expected, 1e-5)
        both(model)


def test_pickles_and_copies():
    """Made while enabled, used without; and the caches are in neither."""
    with integration.enabled():
        model = make_model()
        expected = run(model, IDS)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in copies:
            caches = [m.norm_cache for m in other.modules() if "norm_cache" in vars(m)]
            assert len(caches) == len(TARGETS) and not any(cache.computed for cache in caches)
    for other in copies:
        assert_same(run(other, IDS), expected, 1e-5)
        assert not any("norm" in name for name in other.state_dict())
    old = make_model()
    with integration.enabled():
        run(old, IDS)
    assert_same(run(pickle.loads(pickle.dumps(old)), IDS), expected, 1e-5)


# --- the same results


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_one_layer(name, options):
    layer, x = peft_layer(make_base(name), **options), make_input(name)
    for _ in range(2):  # the second time the norm comes from the cache
        both(layer, x)


@pytest.mark.parametrize("name", BASES)
def test_in_float64(name):
    both(peft_layer(make_base(name, torch.float64)).double(), make_input(name, torch.float64), 1e-12)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_base(name, adapter_dtype):
    """PEFT's adapters are float32 over such a base; results and gradients keep PEFT's dtypes."""
    layer = peft_layer(make_base(name, torch.bfloat16))
    for parameter_name, p in layer.named_parameters():
        if "lora" in parameter_name:
            p.data = p.data.to(adapter_dtype)
    both(layer, make_input(name, torch.bfloat16), 2e-2)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name, options, dtypes):
    base_dtype, x_dtype = dtypes
    layer = peft_layer(make_base(name, base_dtype), **options)
    x = make_input(name, x_dtype)

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    both(Autocast(), x, 2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_on_cuda(name, dtype, tolerance):
    layer = peft_layer(make_base(name, dtype, "cuda"))
    assert layer.lora_magnitude_vector["default"].weight.is_cuda
    for _ in range(2):
        both(layer, make_input(name, dtype, "cuda"), tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_bitsandbytes_on_cuda(kind, dropout):
    layer = quantised_layer(kind, torch.float16, dropout, device="cuda")
    x = torch.randn(3, 5, 64, dtype=torch.float16, device="cuda", requires_grad=True)
    expected = {name: t.clone() for name, t in run(layer.eval(), x).items()}
    with integration.enabled():
        assert_same(run(layer, x), expected, 1e-2)


def test_an_input_that_the_base_does_not_take_gives_pefts_error():
    layer, x = peft_layer(nn.Linear(12, 10)), torch.randn(3, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError) as theirs:
        layer(x)
    with integration.enabled(), pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(theirs.value)


OPTIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"first": 2, "conv": 3}, "alpha_pattern": {"second": 11}},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "layers left out": {"exclude_modules": ["first"]},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_whole_models(options):
    both(make_model(**OPTIONS[options]))


def language_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=16, **small,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no checkpoints", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models(name, reentrant):
    model = make_model(
        base=language_model(name), target_modules="all-linear", fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM"
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # GPT-2's own
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert {path.path for path in integration_report(model)} == {"fused"}
    both(Loss(model.train()), torch.randint(50, (2, 9)))


def integration_report(model: nn.Module) -> list:
    with integration.enabled():
        return list(integration.report(model).values())


def test_tied_embeddings():
    both(
        make_model(
            base=Model(tied=True),
        )
    )


def test_a_trained_base_weight_gets_its_gradient():
    model = make_model(target_modules=["first", "conv"])
    for name in ("first", "conv"):
        getattr(model.base_model.model, name).base_layer.weight.requires_grad_()
    both(model, fused=False)


def test_several_adapters_switching_and_disabling():
    model = make_model(("default", "other"))
    activate(model, "default")
    both(model)
    activate(model, "other")
    both(model)
    activate(model, "default", "other")
    both(model, fused=False)
    activate(model, "default")
    outputs = []
    for on in (False, True):
        (integration.enable if on else integration.disable)()
        with model.disable_adapter():
            outputs.append(model(IDS))
    assert torch.equal(*outputs)
    both(model)


def test_mixed_batches_are_refused_as_in_peft():
    model = make_model().eval()
    with integration.enabled(), pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        model(IDS, adapter_names=["default", "__base__"])


def test_plain_lora_beside_dora():
    model = make_model()
    model.add_adapter("lora", peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    activate(model, "lora")
    train_a_little(model)
    both(model, fused=False)
    activate(model, "default", "lora")
    both(model, fused=False)


# --- merging and files


@pytest.mark.parametrize("safe", [False, True])
def test_merging(safe):
    theirs = make_model(("default", "other"))
    ours = copy.deepcopy(theirs)
    original = {name: p.clone() for name, p in theirs.named_parameters()}
    theirs.merge_adapter(safe_merge=safe)
    with integration.enabled():
        ours.merge_adapter(safe_merge=safe)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert_close(p, q, 1e-6, name)
        assert_close(ours(IDS), theirs(IDS), 1e-5)
        ours.unmerge_adapter()
        for name, p in ours.named_parameters():
            assert_close(p, original[name], 1e-5, name)
    theirs.unmerge_adapter()
    expected = theirs.merge_and_unload(safe_merge=safe)
    with integration.enabled():
        merged = ours.merge_and_unload(safe_merge=safe)
    assert type(merged) is Model
    assert_close(merged(IDS), expected(IDS), 1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_merging_a_feature_whose_weights_are_all_zero(name, safe):
    """PEFT's result is NaN there, merged or not; ours is the bias, and merging and unmerging change nothing."""
    with integration.enabled():
        base = make_base(name)
        column = name in ("gpt2 conv1d", "embedding")
        with torch.no_grad():
            base.weight[(slice(None), 3) if column else 3] = 0
        layer, x = peft_layer(base), make_input(name)
        with torch.no_grad():
            B = layer.lora_embedding_B["default"] if name == "embedding" else layer.lora_B["default"].weight
            B[3] = 0
        assert layer.lora_magnitude_vector["default"].weight.flatten()[3] == 0
        before, expected = layer.base_layer.weight.clone(), layer(x)
        layer.merge(safe_merge=safe)
        assert_close(layer(x), expected, 1e-5)
        layer.unmerge()
        assert_close(layer.base_layer.weight, before, 1e-5)
        assert_close(layer(x), expected, 1e-5)


def test_files_are_pefts(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "off")
    with integration.enabled():
        run(model, IDS)
        model.save_pretrained(tmp_path / "on")
        make_model().save_pretrained(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "off").iterdir()}
    assert "adapter_model.safetensors" in files and "adapter_config.json" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "on").iterdir()} == files
    # Magnitudes that we made are norms in float32, rounded in another order than PEFT's.
    made, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("made", "off"))
    assert made.keys() == theirs.keys()
    for name, t in theirs.items():
        assert made[name].dtype == t.dtype
        assert_close(made[name], t, 1e-6, name)
    torch.manual_seed(5)
    expected = peft.PeftModel.from_pretrained(Model(), tmp_path / "off", is_trainable=True)
    with integration.enabled():
        torch.manual_seed(5)
        loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "off", is_trainable=True)
        results = run(loaded, IDS)
    assert_same(results, run(expected, IDS), 1e-5)


# --- quantised bases


def quantised_layer(kind: str, dtype, dropout: float, bias: bool = True, device: str = "cpu") -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    if kind == "4 bits":
        base = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, quant_type="nf4", compute_dtype=dtype)
    else:
        base = bitsandbytes.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False, threshold=6.0)
    base.load_state_dict(nn.Linear(64, 32, bias=bias).to(dtype).state_dict())
    model = nn.Sequential(OrderedDict(layer=base.to(device)))
    setattr(model, "is_loaded_in_4bit" if kind == "4 bits" else "is_loaded_in_8bit", True)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["layer"])
    return train_a_little(peft.get_peft_model(model, config).base_model.model.layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_bitsandbytes(kind, dtype, tolerance, dropout, bias):
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    # PEFT cannot call an 8-bit layer on the CPU twice: each has its own.
    expected = run(quantised_layer(kind, dtype, dropout, bias), x)
    layer = quantised_layer(kind, dtype, dropout, bias)
    with integration.enabled():
        for _ in range(2):
            before = forwards.calls["fused"]
            assert_same(run(layer, x), expected, tolerance)
            fused = kind == "4 bits" or not dropout
            assert forwards.calls["fused"] == before + fused
        if fused:
            assert layer.lora_magnitude_vector["default"].norm_cache.computed == 1


def test_a_4_bit_weight_is_not_kept_dense_for_backward():
    layer = quantised_layer("4 bits", torch.float32, 0.0)
    kept = []
    with (
        integration.enabled(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
    ):
        layer(torch.randn(5, 64))
    assert kept and torch.Size([32, 64]) not in kept


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "4 bits", "8 bits"])
def test_an_activation_that_overwrites_the_output(kind):
    """Layers keep their output for the magnitude's gradient, unless it is gone."""
    make = (lambda: quantised_layer(kind, torch.float32, 0.0)) if "bits" in kind else (lambda: peft_layer(base))
    base = None if "bits" in kind else make_base(kind)
    x = torch.randn(5, 64 if "bits" in kind else 12)
    expected = run(nn.Sequential(make(), nn.ReLU()), x)
    with integration.enabled():
        assert_same(run(nn.Sequential(make(), nn.ReLU(inplace=True)), x), expected, 1e-5)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 3, 12), (2, 1, 3, 12)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_shapes_of_inputs(shape, dropout):
    layer, x = peft_layer(nn.Linear(12, 10), dropout=dropout), torch.randn(shape, requires_grad=True)
    torch.manual_seed(0)
    expected = layer(x)
    with integration.enabled():
        torch.manual_seed(0)
        y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    assert_close(y, expected.reshape(y.shape), 1e-5)  # PEFT makes a vector a matrix of one row
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_an_adapter_that_does_nothing_yet_changes_nothing():
    """As in PEFT: not a bit."""
    for base in (nn.Linear(100, 50), make_base("gpt2 conv1d")):
        config = peft.LoraConfig(
            use_dora=True, target_modules=["layer"], fan_in_fan_out=not isinstance(base, nn.Linear)
        )
        x = torch.randn(7, 100 if isinstance(base, nn.Linear) else 12)
        expected = base(x)
        with integration.enabled(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(nn.Sequential(OrderedDict(layer=base)), config)
            assert torch.equal(model(x), expected)
