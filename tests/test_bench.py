"""The benchmark's own machinery: tables come from the committed results, and a rival's failure is written down."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from bench import __main__ as program
from bench import (
    bench_conv,
    bench_decode,
    bench_embedding,
    bench_error,
    bench_forward,
    bench_linear,
    bench_nf4,
    measure,
    rivals,
    rows,
    shapes,
    tables,
)

ROOT = Path(__file__).parents[1]
SMALL = shapes.LinearShape(8, 16, 24, 2)


@pytest.mark.parametrize("name", ["README.md", "docs/measured.md", "docs/several_gpus.md"])
def test_tables_are_those_of_the_results(name):
    page = (ROOT / name).read_text()
    assert tables.MARKERS.search(page), f"{name} has no table markers"
    assert tables.render(page) == page, f"run: python -m bench.tables --write {name}"


def test_committed_results_are_complete():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        facts = json.loads(path.read_text())["facts"]
        assert {"device", "torch", "peft", "commit", "date"} <= set(facts), path


@pytest.fixture
def small(monkeypatch):
    """Every bench at one small shape."""
    for bench in (bench_linear, bench_nf4, bench_forward):
        monkeypatch.setitem(bench.SHAPES, "cpu", [SMALL])
    monkeypatch.setitem(bench_conv.SHAPES, "cpu", [shapes.ConvShape(2, 4, 6, 3, (5, 4), 2)])
    monkeypatch.setitem(bench_embedding.SHAPES, "cpu", [shapes.EmbeddingShape(5, 12, 6, 2)])
    monkeypatch.setitem(bench_decode.ROWS, "cpu", [(SMALL, bench_decode.DENSE)])


def test_a_rivals_failure_is_a_result(small, monkeypatch, tmp_path, capsys):
    build = rivals.build

    def fail_for_one(name, problem):
        if name == "peft_dora":
            raise RuntimeError("out of luck")
        return build(name, problem)

    for module in (rivals, bench_error):
        monkeypatch.setattr(module, "build", fail_for_one)
    out = tmp_path / "new" / "r.json"
    assert program.main(["--device", "cpu", "--quick", "--out", str(out), "--plot"]) == 0
    results = json.loads(out.read_text())
    for key, bare in (("linear_step", "linear"), ("conv_step", "conv"), ("embedding_step", "embedding")):
        timed = results[key][0]["rivals"]
        assert timed["peft_dora"] == {"error": "RuntimeError: out of luck"}
        assert list(timed) == [bare, "peft_lora", "peft_dora", rivals.OURS]
        assert all(timed[name]["wall_ms"] > 0 for name in (bare, "peft_lora", rivals.OURS))
        assert "| failed |" in tables.section(key, "r", tmp_path / "new")
    assert all(r["wall_ms"] > 0 for key in ("forward", "decode") for r in results[key][0]["rivals"].values())
    assert "peft_dora failed: RuntimeError: out of luck" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_one_op_can_be_chosen(small, tmp_path):
    out = tmp_path / "r.json"
    program.main(["linear", "--device", "cpu", "--quick", "--out", str(out)])
    assert "errors" not in json.loads(out.read_text())
    with pytest.raises(SystemExit):
        program.main(["no_such_op"])


def test_what_was_measured_before_a_failure_is_told():
    timed = {"wall_ms": 2.0, "peak_mib": 3.0}
    ours = timed | {"device_ms": 1.5}
    row = {"rivals": {"linear": timed | {"error": "cannot be captured"}, rivals.OURS: ours}, "floor_ms": 0.5}
    *_, line = rows.table([row], bench_linear.NAMES, "shape", lambda _: "8")
    assert line == "| 8 | failed / 2.00 / 3 | 1.500 / 2.00 / 3 | 0.500, 3.00 |"
    *_, line = rows.table([row], bench_linear.NAMES, "shape", lambda _: "8", unit="µs")
    assert line.endswith("| 1500.0 / 2000 / 3 | 500.0, 3.00 |")


def test_unmeasured_sections_say_so(tmp_path):
    page = "a\n<!-- bench: linear_step nogpu -->\nold\n<!-- /bench -->\nb\n"
    assert "not measured yet" in tables.render(page, tmp_path)
    assert "old" not in tables.render(page, tmp_path)


def test_cpu_peak_counts_what_is_held():
    def step():
        a = torch.ones(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return b + 1

    assert measure.cpu_peak_mib(step, lambda: None) == pytest.approx(8, rel=0.01)


def test_gpu_status_is_one_line_of_the_report(tmp_path):
    report = tmp_path / "gpu_report.json"
    assert tables.gpu_status(report) == "GPU status: untested: not run on a GPU yet\n"
    report.write_text(json.dumps({"untested": "no machine could be had"}))
    assert tables.gpu_status(report) == "GPU status: untested: no machine could be had\n"
    facts = {"device": "NVIDIA H100", "torch": "2.11.0", "date": "2026-01-01"}
    suite = {"passed": 9, "passed_cuda": 4, "failed": 0}
    report.write_text(json.dumps(facts | {"pytest": suite, "sanitizer": {"memcheck": {"errors": 0}}}))
    line = tables.gpu_status(report)
    assert "9 tests passed (4 of them on the GPU), 0 failed" in line and "memcheck 0" in line


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_are_named_after_the_gpu(monkeypatch, name, stem):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert program.stem("cuda") == stem
