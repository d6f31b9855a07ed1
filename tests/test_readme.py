"""What the README shows runs, and what it points to exists."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_ext import NF4Linear
from dora_ext.injection import dora_layers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_one_layer():
    (code,) = (s for s in SNIPPETS if "DoraLinear.from_base" in s)
    names = {}
    exec(code, names)
    assert names["layer"].merged
    assert len(code.strip().splitlines()) <= 12


def test_whole_model(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    (code,) = (s for s in SNIPPETS if "save_adapter(model" in s)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    names = {"model": model, "fresh_model": copy.deepcopy(model)}
    exec(code, names)
    x = torch.randn(3, 4)
    torch.testing.assert_close(names["fresh_model"](x), names["model"](x))
    assert (tmp_path / "my-adapter" / "adapter_config.json").exists()


def test_configured_model():
    (code,) = (s for s in SNIPPETS if "DoraConfig(" in s)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 8)}) for _ in "ab")
    before = copy.deepcopy(model)
    train = "for m in dora_layers(model).values(): m.lora_B['default'].weight.data.fill_(0.1)\nranks = ranks_of(model)"
    ranks_of = lambda model: {n: (m.r, m.alpha) for n, m in dora_layers(model).items()}  # noqa: E731
    names = {"model": model, "dora_layers": dora_layers, "ranks_of": ranks_of}
    exec(code.replace("...\n", f"{train}\n"), names)
    assert names["ranks"] == {"layers.0.q_proj": (8, 32), "layers.1.q_proj": (8, 16), "layers.1.up_proj": (16, 16)}
    for (name, after), plain in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(after, plain) != (name.removesuffix(".weight") in names["ranks"]), name


def test_packed_model():
    (code,) = (s for s in SNIPPETS if "quantize_layers(model)" in s)
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
    exec(code, {"model": model})
    assert [type(layer.base_layer) for layer in dora_layers(model).values()] == [NF4Linear, NF4Linear]
    model(torch.randn(3, 64)).sum().backward()
    assert model[0].magnitude.grad.abs().sum() > 0


def test_peft(capsys):
    peft = pytest.importorskip("peft")
    (code,) = (s for s in SNIPPETS if "dora.enable()" in s)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    names = {"peft_model": peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)}
    try:
        exec(code, names)
    finally:
        names["dora"].disable()
    assert "base_model.model.0  fused" in capsys.readouterr().out


def test_named_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    paths = re.findall(r"(?<![\w/.-])((?:csrc|dora_ext|tests|bench|examples)/[\w/.*]*\w)", PAGE)
    missing = [p for p in {*links, *paths} if not list(ROOT.glob(p))]
    # Written on a GPU machine.
    assert not set(missing) - {"tests/gpu_report.json"}
