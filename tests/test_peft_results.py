"""PEFT's models with enable() on and off: the same results and gradients."""

import warnings
from collections import OrderedDict

import pytest
import torch
from module_cases import BASES, ONE_OF_EACH, assert_same, make_base, make_input, peft_layer, run, train_a_little
from peft_cases import IDS, TARGETS, Loss, Model, activate, both, language_model, make_model, quantised_layer
from torch import nn

import dora_ext.integrations.peft as integration
from dora_ext.testing import assert_close

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("peft_switched_off"), pytest.mark.filterwarnings("ignore::UserWarning")]


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


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_inference_mode(name):
    layer, x = peft_layer(make_base(name)).eval(), make_input(name)
    with torch.inference_mode():
        expected = layer(x)
        with integration.enabled():
            for _ in range(2):
                assert_close(layer(x), expected, 1e-5)
