"""The benchmark of several ranks, as torchrun starts it, at trial sizes over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from bench import bench_distributed as bench

ROOT = Path(__file__).parents[1]


def run(out: Path, *options: str, ranks: int = 2) -> dict:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous]
    command += ["-m", "bench.bench_distributed", "--quick", "--device", "cpu", "--out", str(out), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "engine, base, methods", [("fsdp2", "nf4", list(bench.METHODS)), ("ddp", "bf16", ["dora_ext", "peft_lora"])]
)
def test_the_methods_train_the_same_model(tmp_path, engine, base, methods):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    found = run(tmp_path / "r.json", "--engine", engine, "--base", base, "--method", *methods)
    assert found["facts"]["ranks"] == 2 and found["settings"]["engine"] == engine
    results = found["distributed"]
    assert list(results) == methods
    for method, result in results.items():
        assert "error" not in result, f"{method}: {result}"
        assert result["efficiency"] == pytest.approx(result["alone"]["step_ms"] / result["step_ms"])
        losses = [torch.tensor(rank["losses"]) for rank in (*result["ranks"], result["alone"])]
        assert all(t.isfinite().all() for t in losses)
        # B starts at 0: before the first step each method is the base model. Rank 0 alone has the same tokens.
        expected = results["peft_lora"]["ranks"]
        for ours, theirs in zip(result["ranks"], expected, strict=True):
            assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=2e-3)
        assert result["alone"]["losses"][0] == pytest.approx(expected[0]["losses"][0], rel=2e-3)
    counts = {method: result["ranks"][0]["trained"] for method, result in results.items()}
    lora = counts.pop("peft_lora")
    assert len(set(counts.values())) == 1 and counts["dora_ext"] > lora
    table = bench.table(results)
    assert len(table) == 2 + len(results) and "failed" not in "".join(table)


def test_a_methods_failure_is_a_result(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench, "measure", fails)
    args = bench.parse(["--quick", "--method", "peft_lora"])
    assert bench.attempt("peft_lora", args, torch.device("cpu"), None) == {"error": "RuntimeError: out of luck"}
    assert "failed" in bench.table({"peft_lora": {"error": "RuntimeError: out of luck"}})[-1]
