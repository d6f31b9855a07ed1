"""Every way an adapter's files can be wrong, without the model's changing."""

import copy

import pytest
import torch
from adapter_cases import Net, edit_config, edit_tensors, move, truncate

from dora_ext.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, load_adapter, save_adapter
from dora_ext.injection import inject

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


# What is written over a good adapter, and what the error must name.
KEY = "base_model.model.blocks.0.up.lora_B.weight"
WRONG = {
    "truncated": (lambda f: truncate(f / WEIGHTS_NAME, 0.7), AdapterError, WEIGHTS_NAME),
    "truncated header": (lambda f: truncate(f / WEIGHTS_NAME, 0.01), AdapterError, WEIGHTS_NAME),
    "empty": (lambda f: (f / WEIGHTS_NAME).write_bytes(b""), AdapterError, WEIGHTS_NAME),
    "noise": (lambda f: (f / WEIGHTS_NAME).write_bytes(bytes(range(256)) * 20), AdapterError, WEIGHTS_NAME),
    "pickle inside": (lambda f: torch.save({}, f / WEIGHTS_NAME), AdapterError, WEIGHTS_NAME),
    "pickled .bin": (
        lambda f: (torch.save({}, f / "adapter_model.bin"), (f / WEIGHTS_NAME).unlink()), AdapterError, "pickle"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), FileNotFoundError, WEIGHTS_NAME),
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), FileNotFoundError, CONFIG_NAME),
    "config cut": (lambda f: truncate(f / CONFIG_NAME, 0.5), AdapterError, CONFIG_NAME),
    "config not text": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), AdapterError, CONFIG_NAME),
    "config is a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), AdapterError, "list"),
    "plain LoRA": (lambda f: edit_config(f, use_dora=False), AdapterError, "use_dora False"),
    "other method": (lambda f: edit_config(f, peft_type="IA3"), AdapterError, "IA3"),
    "r missing": (lambda f: edit_config(f, r=...), AdapterError, "r: expected"),
    "r zero": (lambda f: edit_config(f, r=0), AdapterError, "r: expected"),
    "r other": (lambda f: edit_config(f, r=4, lora_alpha=8), AdapterError, "expected shape|rank 4"),
    "alpha not finite": (lambda f: edit_config(f, lora_alpha=float("nan")), AdapterError, "lora_alpha"),
    "trains biases": (lambda f: edit_config(f, bias="all"), AdapterError, "bias"),
    "saves modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), AdapterError, "modules_to_save"),
    "no targets": (lambda f: edit_config(f, target_modules=None), AdapterError, "target_modules"),
    "other targets": (lambda f: edit_config(f, target_modules=["conv1"]), AdapterError, "missing key.*conv1"),
    "key missing": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), AdapterError, f"missing key {KEY}"),
    "key unknown": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), AdapterError, "unknown key extra"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].T.contiguous()})), AdapterError,
              r"expected shape \(10, 2\), got \(2, 10\)"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].int()})), AdapterError, "int32"),
    "foreign": (lambda f: safetensors_torch.save_file({"w": torch.ones(2)}, f / WEIGHTS_NAME), AdapterError,
                r"(?s)missing key.*unknown key w"),
}  # fmt: skip


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_changes_nothing(net, tmp_path, case, injected):
    fresh = copy.deepcopy(net)
    save_adapter(move(inject(net, ["up", "down"], r=2, alpha=4)), tmp_path)
    spoil, error, message = WRONG[case]
    spoil(tmp_path)
    if injected:
        inject(fresh, ["up", "down"], r=2, alpha=4)
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    flags = {n: p.requires_grad for n, p in fresh.named_parameters()}
    with pytest.raises(error, match=message):
        load_adapter(fresh, tmp_path)
    after = fresh.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == flags


def test_scaling_mismatch(net, tmp_path):
    fresh = copy.deepcopy(net)
    save_adapter(inject(net, ["up"], r=2, alpha=4), tmp_path)
    with pytest.raises(AdapterError, match="scaling 2 in the file, 8 in the model"):
        load_adapter(inject(fresh, ["up"], r=2, alpha=16), tmp_path)


def test_merged_layers_take_no_adapter(net, tmp_path):
    fresh = copy.deepcopy(net)
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    inject(fresh, ["up"], r=2).blocks[1]["up"].merge()
    with pytest.raises(AdapterError, match=r"blocks\.1\.up is merged"):
        load_adapter(fresh, tmp_path)


def test_missing_and_unknown_keys_both_listed(net, tmp_path):
    fresh = copy.deepcopy(net)
    save_adapter(inject(net, ["up"], r=2), tmp_path)

    def rename(tensors):
        tensors[KEY + ".old"] = tensors.pop(KEY)

    edit_tensors(tmp_path, rename)
    with pytest.raises(AdapterError, match=rf"(?s)missing key {KEY}\n.*unknown key {KEY}\.old"):
        load_adapter(fresh, tmp_path)
