"""Which path each layer takes, that `report` says what the forward does, and that every path gives PEFT's results."""

from collections import OrderedDict

import pytest
import torch
from module_cases import assert_same, make_base, make_input, peft_layer, run
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import dora_ext.integrations.peft as integration
from dora_ext.integrations.peft import forwards
from dora_ext.testing import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def on():
    with integration.enabled():
        yield


def path_of(layer: nn.Module) -> integration.Path:
    return integration.report(nn.Sequential(OrderedDict(layer=layer)))["layer"]


def same_as_peft(layer: nn.Module, x, path: str, tolerance: float = 1e-5) -> None:
    """The forward takes `path`, `report` says so, and the results are PEFT's."""
    assert path_of(layer).path == path
    integration.disable()
    assert path_of(layer) == ("peft", "enable() is not in force", -1)
    expected = {name: t.clone() for name, t in run(layer, x).items()}
    integration.enable()
    before = forwards.calls["fused"]
    assert_same(run(layer, x), expected, tolerance)
    assert forwards.calls["fused"] - before == (path == "fused")


class Wrapped(nn.Module):
    """What FSDP, accelerate and the like put around a layer."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.in_features, self.weight = getattr(module, "in_features", None), module.weight
        self.bias = module.bias

    def forward(self, x):
        return self.module(x)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Renamed(nn.Linear):
    """Another class that computes the same."""


def hook(module):
    module.register_forward_hook(lambda *_: None)


def own_forward(module):
    old = module.forward
    module.forward = lambda *args: old(*args)


def wrap_lora_A(layer):
    layer.lora_A["default"] = Wrapped(layer.lora_A["default"])


def give_B_a_bias(layer):
    B = layer.lora_B["default"]
    B.bias = nn.Parameter(torch.randn(B.out_features))


def tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(1.25)


CHANGES = {
    "hook on the base": (lambda layer: hook(layer.base_layer), "the base layer has hooks"),
    "pre-hook on the base": (
        lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None), "the base layer has hooks"
    ),
    "accelerate's forward": (lambda layer: own_forward(layer.base_layer), "the base layer has hooks or a forward"),
    "hook on A": (lambda layer: hook(layer.lora_A["default"]), "A or B is wrapped, hooked"),
    "hook on the magnitude": (lambda layer: hook(layer.lora_magnitude_vector["default"]), "the magnitude is wrapped"),
    "wrapped A": (wrap_lora_A, "A or B is wrapped"),
    "B with a bias": (give_B_a_bias, "lora_bias"),
    "trained base": (lambda layer: layer.base_layer.weight.requires_grad_(), "the base weight is trained"),
    "scaling in a tensor": (tensor_scaling, "the scaling is a tensor"),
    "parametrized base": (
        lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity()),
        "not a plain floating-point tensor",
    ),
    "parametrized bias": (
        lambda layer: parametrize.register_parametrization(layer.base_layer, "bias", nn.Identity()),
        "not a plain floating-point tensor",
    ),
    "another dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.3)}), "a dropout that is not"
    ),
    "wrong layout": (lambda layer: setattr(layer, "fan_in_fan_out", True), "fan_in_fan_out"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_one_call(change):
    function, reason = CHANGES[change]
    layer = peft_layer(nn.Linear(12, 12) if change == "wrong layout" else nn.Linear(12, 10))
    assert path_of(layer).path == "fused"
    function(layer)
    assert reason in path_of(layer).reason
    if change == "wrong layout":
        layer.lora_magnitude_vector["default"].fan_in_fan_out = True
    layer.base_layer.requires_grad_(change == "trained base")
    same_as_peft(layer, torch.randn(3, 5, 12), "delta")


@pytest.mark.parametrize("name", ["embedding", "conv1d", "gpt2 conv1d"])
def test_hooks_on_other_bases(name):
    layer = peft_layer(make_base(name))
    hook(layer.base_layer)
    same_as_peft(layer, make_input(name), "delta")


def test_base_hooks_are_called():
    layer, seen = peft_layer(nn.Linear(12, 10)), []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(3, 12))
    assert seen == [1]


def test_hooks_on_all_modules():
    layer = peft_layer(nn.Linear(12, 10))
    handle = register_module_forward_hook(lambda *_: None)
    try:
        same_as_peft(layer, torch.randn(3, 12), "delta")
    finally:
        handle.remove()
    same_as_peft(layer, torch.randn(3, 12), "fused")


@pytest.mark.parametrize("cls, path", [(OwnForward, "delta"), (Renamed, "fused")])
def test_subclasses(cls, path):
    same_as_peft(peft_layer(cls(12, 10)), torch.randn(3, 12), path)


def test_replaced_forward_of_the_layer_itself():
    layer = peft_layer(nn.Linear(12, 10))
    own_forward(layer)
    assert path_of(layer)[:2] == ("delta", "the layer's forward has been replaced")


def test_layers_of_peft_that_are_not_switched_over():
    """Tuner classes for other quantisations; here one that only changes the forward."""
    from peft.tuners.lora import layer as peft_layers

    class Other(peft_layers.Linear):
        def forward(self, x):
            return super().forward(x)

    layer = peft_layer(nn.Linear(12, 10))
    layer.__class__ = Other
    assert path_of(layer)[:2] == ("delta", "PEFT's Other does its own base product")


def test_unusual_embeddings():
    layer = peft_layer(nn.Embedding(20, 8, sparse=True))
    assert path_of(layer).path == "delta"

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    same_as_peft(peft_layer(Scaled(20, 8)), make_input("embedding"), "delta")


def test_ids_that_are_not_integers_give_pefts_error():
    layer = peft_layer(nn.Embedding(20, 8))
    with pytest.raises(RuntimeError, match="indices"):
        layer(torch.randn(3))


def test_states_in_which_peft_does_everything():
    layer, x = peft_layer(nn.Linear(12, 10)), torch.randn(3, 12)
    layer.enable_adapters(False)
    assert path_of(layer)[:2] == ("peft", "adapters are disabled")
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    unmerged = layer(x)
    layer.merge()
    assert path_of(layer)[:2] == ("peft", "an adapter is merged into the base weight")
    assert_close(layer(x), unmerged, 1e-5)
    layer.unmerge()
    layer.set_adapter([])
    assert path_of(layer)[:2] == ("peft", "no active adapter on this layer")
    assert torch.equal(layer(x), layer.base_layer(x))


def test_caching_as_in_peft():
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("this PEFT has no DoraCaching")
    layer, x = peft_layer(nn.Linear(12, 10)).eval(), torch.randn(3, 12)
    cache = layer.lora_magnitude_vector["default"]._dora_cache
    expected = layer(x)
    with helpers.DoraCaching():
        assert path_of(layer)[:2] == ("delta", "PEFT's DoraCaching is on")
        assert_close(layer(x), expected, 1e-6)
        assert cache
    assert path_of(layer).path == "fused"
    layer(x)
    assert not cache
    with helpers.DoraCaching():
        layer.train()
        assert path_of(layer).path == "fused"


@pytest.mark.cuda
def test_magnitude_left_on_the_cpu():
    """ephemeral_gpu_offload initialises so."""
    layer = peft_layer(nn.Linear(12, 10)).cuda()
    dora = layer.lora_magnitude_vector["default"]
    expected = layer(torch.ones(3, 12, device="cuda"))
    dora.weight.data = dora.weight.data.cpu()
    assert path_of(layer).path == "delta"
    assert_close(layer(torch.ones(3, 12, device="cuda")), expected, 1e-5)


def test_report():
    model = nn.Sequential(OrderedDict(first=nn.Linear(12, 10), second=nn.Linear(10, 8), third=nn.Linear(8, 8)))
    assert str(integration.report(model)) == "no DoRA layers"
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["first", "second"])
    model = peft.get_peft_model(model, config)
    hook(model.base_model.model.second.base_layer)
    report = integration.report(model)
    assert {name: path.path for name, path in report.items()} == {
        "base_model.model.first": "fused",
        "base_model.model.second": "delta",
    }
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "path", "why"] and lines[-1] == "1 fused, 1 delta"
    assert lines[2].startswith("base_model.model.second  delta  the base layer has hooks")


# --- the deltas of unusual weights, in plain PyTorch


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
def test_tensor_subclasses_and_tensor_scalings(name):
    class Subclass(torch.Tensor):
        pass

    layer = peft_layer(make_base(name))
    tensor_scaling(layer)
    same_as_peft(layer, make_input(name), "delta")
    layer = peft_layer(make_base(name))
    weight = layer.base_layer.weight.detach().as_subclass(Subclass)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    assert type(layer.base_layer.weight) is not nn.Parameter
    same_as_peft(layer, make_input(name), "delta")
