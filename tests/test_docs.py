"""Every page in docs/ with Python on it runs from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

from dora_ext import load_adapter

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str) -> dict:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL))
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    return names


def test_every_page_has_a_test():
    assert {page.name for page in DOCS.glob("*.md") if "```python" in page.read_text(encoding="utf-8")} == {"peft.md"}


def test_peft(tmp_path, monkeypatch):
    for package in ("peft", "transformers", "accelerate", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    import dora_ext.integrations.peft as dora

    monkeypatch.chdir(tmp_path)
    try:
        names = run_page("peft.md")
    finally:
        dora.disable()
    assert names["callback"].history.steps == [0, 10, 20]
    assert all(m > 0 and d > 0 for m, d in names["changes"].values())
    assert (tmp_path / "magnitudes.png").stat().st_size > 10_000
    # The adapter that PEFT saved gives, in our own layers, what PEFT merged.
    merged = names["merged"].eval()
    ours = load_adapter(names["make_model"](), tmp_path / "adapter").to(merged.device).eval()
    ids = names["make_rows"](4).to(merged.device)
    torch.testing.assert_close(ours(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
