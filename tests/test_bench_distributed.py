"""The benchmark of several ranks, as torchrun starts it, at trial sizes over gloo."""

import json
import os
import statistics
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
    "engine, base, methods, turns",
    [("fsdp2", "nf4", list(bench.METHODS), 1), ("ddp", "bf16", ["dora_ext", "peft_lora"], 2)],
)
def test_the_methods_train_the_same_model(tmp_path, engine, base, methods, turns):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    options = ["--engine", engine, "--base", base, "--turns", str(turns), "--method", *methods]
    found = run(tmp_path / "r.json", *options)
    assert found["facts"]["ranks"] == 2 and found["settings"]["engine"] == engine
    results = found["distributed"]
    assert list(results) == methods
    for method, result in results.items():
        assert "error" not in result, f"{method}: {result}"
        alone = result["each_alone"]
        assert len(alone) == 2 and result["alone"] == max(alone, key=lambda one: one["step_ms"])
        assert result["efficiency"] == pytest.approx(result["alone"]["step_ms"] / result["step_ms"])
        for one in (*result["ranks"], *alone):
            assert len(one["steps_ms"]) == turns * bench.QUICK["steps"]
            assert one["step_ms"] == statistics.median(one["steps_ms"])
        losses = [torch.tensor(rank["losses"]) for rank in (*result["ranks"], *alone)]
        assert all(t.isfinite().all() for t in losses)
        # B starts at 0: before the first step each method is the base model. Alone, a rank has the same tokens.
        expected = results["peft_lora"]["ranks"]
        for ours, one, theirs in zip(result["ranks"], alone, expected, strict=True):
            for first in (ours["losses"][0], one["losses"][0]):
                assert first == pytest.approx(theirs["losses"][0], rel=2e-3)
    counts = {method: result["ranks"][0]["trained"] for method, result in results.items()}
    lora = counts.pop("peft_lora")
    assert len(set(counts.values())) == 1 and counts["dora_ext"] > lora
    table = bench.table(results)
    assert len(table) == 2 + len(results) and "failed" not in "".join(table)


def test_turns_are_put_together():
    first = {"steps_ms": [3.0, 1.0], "peak_mib": 7.0, "trained": 5, "losses": [2.0]}
    once = bench.with_turn(None, first)
    assert once == first | {"step_ms": 2.0}
    twice = bench.with_turn(once, {"steps_ms": [9.0], "peak_mib": 8.0, "trained": 5, "losses": [4.0]})
    assert twice == {"steps_ms": [3.0, 1.0, 9.0], "step_ms": 3.0, "peak_mib": 8.0, "trained": 5, "losses": [2.0]}
    error = {"error": "RuntimeError: out of luck"}
    assert bench.with_turn(once, error) == bench.with_turn(error, once) == error
    assert bench.summary([once, error], [once]) == {"ranks": [once, error], **error}
    result = bench.summary([once, twice], [once, once | {"step_ms": 2.5}])
    assert (result["step_ms"], result["peak_mib"], result["efficiency"]) == (3.0, 8.0, 2.5 / 3.0)
    assert "efficiency" not in bench.summary([once], [])
    assert "efficiency" not in bench.summary([once, twice], [once, error])


def test_a_methods_failure_is_a_result(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench, "measure", fails)
    args = bench.parse(["--quick", "--method", "peft_lora"])
    assert bench.attempt("peft_lora", args, torch.device("cpu"), None) == {"error": "RuntimeError: out of luck"}
    assert "failed" in bench.table({"peft_lora": {"error": "RuntimeError: out of luck"}})[-1]
