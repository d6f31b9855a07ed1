"""What PEFT users do with DoRA, as they write it, on our kernels; each result is compared with PEFT's own code's."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from module_cases import train_a_little
from trainer_cases import base_model

from dora_ext.analysis import analyse
from dora_ext.integrations.peft import enabled, report
from dora_ext.testing import assert_close

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(2, 34).remainder(32).view(2, 16)


def dora(base: nn.Module | None = None, **options) -> nn.Module:
    config = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "use_dora": True, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return peft.get_peft_model(base or base_model(), peft.LoraConfig(**(config | options)))


def dora_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if getattr(m, "lora_magnitude_vector", None)}


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def trained(model: nn.Module, steps: int, after_backward=lambda model: None) -> nn.Module:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(steps):
        loss_of(model).backward()
        after_backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def on_both(action) -> tuple:
    """What `action` gives on our kernels, and on PEFT's own code."""
    with enabled():
        ours = action()
    return ours, action()


def test_basic_configuration():
    def run():
        model = dora()
        return loss_of(model).detach(), loss_of(trained(model, 3)).detach(), base_loss

    base_loss = loss_of(base_model()).detach()
    (start, end, _), (their_start, their_end, _) = on_both(run)
    assert_close(start, base_loss, 1e-6)  # B A is 0 and m is |W|: nothing has changed yet
    assert_close(start, their_start, 1e-6)
    assert_close(end, their_end, 1e-6)
    assert end < start
    with enabled():
        lines = str(report(dora()))
    assert lines.count("fused") >= 6, lines


def test_magnitudes():
    with enabled():
        model = dora()
        for name, module in dora_modules(model).items():
            m = module.lora_magnitude_vector["default"].weight
            assert isinstance(m, nn.Parameter) and m.requires_grad
            assert_close(m, module.base_layer.weight.double().norm(dim=1), 1e-6, name)
        trained(model, 3)
        ours = {name: m.lora_magnitude_vector["default"].weight.clone() for name, m in dora_modules(model).items()}
    theirs = {n: m.lora_magnitude_vector["default"].weight for n, m in dora_modules(trained(dora(), 3)).items()}
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for name, module in dora_modules(dora()).items():
        assert_close(ours[name], theirs[name], 1e-5, name)
        assert (ours[name] - module.base_layer.weight.norm(dim=1)).abs().mean() > 1e-3  # they have learned


def test_lora_against_dora_parameter_counts():
    (ours, theirs) = on_both(lambda: dora().get_nb_trainable_parameters())
    assert ours == theirs
    lora, all_lora = dora(use_dora=False).get_nb_trainable_parameters()
    magnitudes = sum(m.lora_magnitude_vector["default"].weight.numel() for m in dora_modules(dora()).values())
    assert magnitudes == sum(m.base_layer.out_features for m in dora_modules(dora()).values())
    assert ours == (lora + magnitudes, all_lora + magnitudes)


@pytest.mark.cuda
def test_ephemeral_offload():
    """The model is on the CPU, and its first norms are computed on the GPU."""

    def run():
        config = peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
        return loss_of(trained(dora(runtime_config=config), 3)).detach()

    ours, theirs = on_both(run)
    assert_close(ours, theirs, 1e-6)


def test_layer_types():
    def run():
        base = nn.Sequential(OrderedDict(e=nn.Embedding(12, 9), c=nn.Conv1d(7, 6, 3, padding=1), o=nn.Linear(9, 4)))
        torch.manual_seed(1)
        base.load_state_dict({k: torch.randn_like(v) for k, v in base.state_dict().items()})
        model = train_a_little(dora(base, target_modules=["e", "c", "o"], task_type=None))
        y = model(torch.arange(14).remainder(12).view(2, 7))
        y.square().sum().backward()
        return y, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    (y, gradients), (their_y, their_gradients) = on_both(run)
    assert_close(y, their_y, 1e-5)
    assert gradients.keys() == their_gradients.keys() and len(gradients) == 9
    for name, gradient in gradients.items():
        assert_close(gradient, their_gradients[name], 1e-5, name)


def test_gradient_monitoring():
    def run():
        seen = []

        def watch(model):
            seen.append({
                name: parameter.grad.norm().item()
                for name, parameter in model.named_parameters()
                if "lora_magnitude_vector" in name and parameter.grad is not None
            })  # fmt: skip
            shown = [layer.magnitude_grad_norm for layer in analyse(model).values()]
            assert shown == pytest.approx(list(seen[-1].values()), rel=1e-5)

        trained(dora(), 4, watch)
        return seen

    ours, theirs = on_both(run)
    assert len(ours) == 4 and all(len(step) == 6 and min(step.values()) > 0 for step in ours)
    for step, their_step in zip(ours, theirs, strict=True):
        assert step == pytest.approx(their_step, rel=1e-4)


def test_weight_norms_over_training():
    def run():
        seen = []

        def watch(model):
            with torch.no_grad():
                for module in dora_modules(model).values():
                    layer, A, B = module.lora_magnitude_vector["default"], module.lora_A, module.lora_B
                    lora_weight = layer.get_lora_weight(A["default"], B["default"])
                    seen.append(layer.get_weight_norm(module.base_layer.weight, lora_weight, module.scaling["default"]))
            shown = [layer.norm.mean for layer in analyse(model).values()]
            assert shown == pytest.approx([n.mean().item() for n in seen[-6:]], rel=1e-5)

        trained(dora(), 4, watch)
        return torch.stack([n.mean() for n in seen]).view(4, 6)

    ours, theirs = on_both(run)
    assert_close(ours, theirs, 1e-5)
    assert (ours[3] - ours[0]).abs().min() > 0


@pytest.mark.parametrize("reading", ["ours", "theirs"])
def test_saving_and_merging(tmp_path, reading):
    with enabled():
        model = trained(dora(), 3).eval()
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload()
    assert not dora_modules(merged)
    with torch.no_grad():
        assert_close(merged(input_ids=IDS).logits, expected, 1e-5)

    def read():
        fresh = peft.PeftModel.from_pretrained(base_model(), tmp_path).eval()
        with torch.no_grad():
            return fresh(input_ids=IDS).logits, fresh.merge_and_unload()(input_ids=IDS).logits

    ours, theirs = on_both(read)
    for logits in ours if reading == "ours" else theirs:
        assert_close(logits, expected, 1e-5)
