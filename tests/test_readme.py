"""What the README shows runs, and what it points to exists."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

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


def test_named_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    paths = re.findall(r"(?<![\w/.-])((?:csrc|dora_ext|tests|bench|examples)/[\w/.*]*\w)", PAGE)
    missing = [p for p in {*links, *paths} if not list(ROOT.glob(p))]
    # Written on a GPU machine.
    assert not set(missing) - {"tests/gpu_report.json"}
