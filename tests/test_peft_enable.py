"""The switch itself, what it leaves behind, merging, and the files of models on our kernels."""

import copy
import pickle
import sys

import pytest
import torch
from module_cases import ONE_OF_EACH, assert_same, make_base, make_input, peft_layer, run
from peft_cases import IDS, TARGETS, Model, both, make_model

import dora_ext
import dora_ext.integrations.peft as integration
from dora_ext.nn import layers as our_layers
from dora_ext.testing import assert_close

load_file = pytest.importorskip("safetensors.torch").load_file
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("peft_switched_off"), pytest.mark.filterwarnings("ignore::UserWarning")]


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
    if name == "gpt2 conv1d" and peft.__version__ < "0.21":
        pytest.skip("PEFT before 0.21 unmerges Conv1D wrongly")
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
