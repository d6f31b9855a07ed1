"""Adapters on disk: to and from real PEFT, and every way a file can be wrong without the model's changing."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from dora_ext.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, adapter_parameters, load_adapter, save_adapter
from dora_ext.injection import dora_layers, inject, target_names

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    """Every kind of layer that has a DoRA twin, a nested path, and a head that a language model would have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2))
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.lm_head = nn.Linear(6, 13, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        y = self.conv2(self.conv1(x.transpose(1, 2))[:, None])
        z = self.conv3(y[:, :1, None].expand(-1, -1, 2, -1, -1))
        return z, self.lm_head(x)


ALL = ["embed", "up", "down", "conv1", "conv2", "conv3"]
IDS = torch.arange(10).view(2, 5) % 13


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def move(model):
    """As after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def assert_same(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


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


# Wrong files: what is written over a good adapter, and what the error must name.


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = safetensors_torch.load_file(folder / WEIGHTS_NAME)
    change(tensors)
    safetensors_torch.save_file(tensors, folder / WEIGHTS_NAME)


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


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


# Saving: whole or not at all.


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_save_without_layers(net, tmp_path):
    with pytest.raises(ValueError, match="no DoRA layer"):
        save_adapter(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_into_a_file(net, tmp_path):
    target = tmp_path / "file"
    target.write_text("mine")
    with pytest.raises(OSError):
        save_adapter(inject(net, ["up"], r=2), target)
    assert target.read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where not even root can make a folder")
def test_save_where_no_folder_can_be(net):
    with pytest.raises(OSError):
        save_adapter(inject(net, ["up"], r=2), "/proc/adapter")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_save_into_unwritable_folder(net, tmp_path):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError):
            save_adapter(move(net), tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert contents(tmp_path) == before


def test_others_may_read_as_the_umask_says(net, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    assert (tmp_path / WEIGHTS_NAME).stat().st_mode == plain.stat().st_mode


def test_failed_replacement_leaves_no_litter(net, tmp_path, monkeypatch):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        save_adapter(move(net), tmp_path)
    assert contents(tmp_path) == before


def test_full_disk_leaves_old_files(net, tmp_path):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)
    # A limit on a file's size stands in for a full disk: writing stops in the middle with an OSError.
    script = textwrap.dedent(f"""
        import resource, torch
        from torch import nn
        from dora_ext.adapter import save_adapter
        from dora_ext.injection import inject
        model = inject(nn.Sequential(nn.Linear(512, 512)), r=64)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_adapter(model, {str(tmp_path)!r})
        except OSError as error:
            print("refused:", error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert contents(tmp_path) == before


def test_partitioned_parameters_are_refused(net, tmp_path):
    inject(net, ["up"], r=2)
    layer = net.blocks[0]["up"]
    next(iter(adapter_parameters(layer).values())).data = torch.empty(0)
    with pytest.raises(ValueError, match="gather"):
        save_adapter(net, tmp_path)
    assert not list(tmp_path.iterdir())
