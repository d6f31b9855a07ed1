"""The benchmark's own machinery: tables come from the committed results, and a rival's failure is written down."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from bench import __main__ as program
from bench import bench_decode, bench_error, bench_linear, bench_nf4, measure, rivals, tables

ROOT = Path(__file__).parents[1]
SMALL = rivals.Shape(8, 16, 24, 2)


def test_readme_tables_are_those_of_the_results():
    page = (ROOT / "README.md").read_text()
    assert tables.MARKERS.search(page), "README.md has no table markers"
    assert tables.render(page) == page, "run: python -m bench.tables --write README.md"


def test_committed_results_are_complete():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        facts = json.loads(path.read_text())["facts"]
        assert {"device", "torch", "peft", "commit", "date"} <= set(facts), path


@pytest.mark.parametrize("name", ["linear", "peft_lora", "peft_dora", rivals.OURS])
def test_rivals_compute_the_same_layer(name):
    problem = rivals.Problem.random(SMALL, "cpu", torch.float64, bias=True)
    rival = rivals.build(name, problem)
    versions = [p._version for p in rival.factors]
    rival.touch()
    assert all(p._version > v for p, v in zip(rival.factors, versions, strict=True))
    assert len(rival.step()) == 1 + len(rival.trained) == {"linear": 1, "peft_lora": 3}.get(name, 4)
    if "dora" in name:
        errors = bench_error.errors_of(name, problem)
        assert set(errors) == set(bench_error.OUTPUTS)
        assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("name", bench_nf4.NAMES)
def test_rivals_over_four_bits_compute_the_same_layer(bnb, name):
    problem = rivals.Problem.random(SMALL, "cpu", torch.float32, bias=True)
    rival = bench_nf4.build(name, problem)
    weight = bench_nf4.linear4bit(problem).weight
    problem.weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    same = rivals.build("peft_lora" if name == "peft_qlora" else "peft_dora", problem)
    for ours, expected in zip(rival.step(), same.step(), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_a_rivals_failure_is_a_result(monkeypatch, tmp_path, capsys):
    build = rivals.build

    def fail_for_one(name, problem):
        if name == "peft_dora":
            raise RuntimeError("out of luck")
        return build(name, problem)

    for module in (bench_linear, bench_error):
        monkeypatch.setattr(module, "build", fail_for_one)
    for module in (bench_linear, bench_nf4):
        monkeypatch.setattr(module, "CPU_SHAPES", [SMALL])
    monkeypatch.setattr(bench_decode, "CPU_ROWS", [(SMALL, bench_decode.DENSE)])
    out = tmp_path / "new" / "r.json"
    assert program.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    timed = results["linear_step"][0]["rivals"]
    assert timed["peft_dora"] == {"error": "RuntimeError: out of luck"}
    assert all(timed[name]["wall_ms"] > 0 for name in ("linear", "peft_lora", rivals.OURS))
    assert "peft_dora failed: RuntimeError: out of luck" in capsys.readouterr().out
    assert "| failed |" in tables.section("linear_step", "r", tmp_path / "new")


@pytest.mark.parametrize("weights", [bench_decode.DENSE, bench_decode.PACKED])
@pytest.mark.parametrize("name", bench_decode.NAMES)
def test_inference_is_the_same_with_the_norm_at_hand(bnb, name, weights):
    problem = rivals.Problem.random(rivals.Shape(1, 64, 24, 2), "cpu", torch.float32, bias=True)
    call, at_hand = bench_decode.build(name, weights, problem)
    y = at_hand()
    y = y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(call(), y, rtol=1e-5, atol=1e-5)


def test_one_op_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_linear, "CPU_SHAPES", [SMALL])
    out = tmp_path / "r.json"
    program.main(["linear", "--device", "cpu", "--quick", "--out", str(out)])
    assert "errors" not in json.loads(out.read_text())
    with pytest.raises(SystemExit):
        program.main(["no_such_op"])


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
