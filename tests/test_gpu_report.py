import json
import time
from types import SimpleNamespace

import gpu_report
import pytest

README = "# dora_ext\n\nGPU status: untested, since no machine could be had\n"
CLEAN = {"passed": 3, "failed": 0, "errors": 0}
GOOD = {
    "digest": "abc",
    "pytest": {"passed": 9, "failed": 0, "skipped": 1, "passed_cuda": 4},
    "sanitizer": dict.fromkeys(gpu_report.TOOLS, CLEAN),
}


def changed(**parts):
    return {**GOOD, **parts}


def test_a_clean_report_of_these_sources_stands():
    assert gpu_report.problems(GOOD, "", "abc") == []


@pytest.mark.parametrize(
    ("report", "word"),
    [
        ({}, "changed"),
        (changed(digest="other"), "changed"),
        (changed(pytest={"passed": 9, "failed": 1, "passed_cuda": 4}), "tests on the GPU"),
        (changed(pytest={"passed": 9, "failed": 0, "passed_cuda": 0}), "tests on the GPU"),
        (changed(sanitizer={}), "memcheck"),
        (changed(sanitizer={**GOOD["sanitizer"], "racecheck": {"passed": 3, "failed": 0, "errors": 2}}), "racecheck"),
        (changed(sanitizer={**GOOD["sanitizer"], "memcheck": {**CLEAN, "timed_out": True}}), "memcheck"),
        (changed(sanitizer={**GOOD["sanitizer"], "synccheck": {"passed": 0, "failed": 0, "errors": 0}}), "synccheck"),
    ],
)
def test_anything_else_does_not(report, word):
    assert any(word in line for line in gpu_report.problems(report, README, "abc"))


def test_untested_needs_its_reason_in_the_readme():
    assert gpu_report.problems({"untested": "no machine could be had"}, README, "abc") == []
    assert gpu_report.problems({"untested": "no machine could be had"}, "# dora_ext", "abc")
    assert gpu_report.problems({"untested": "another reason"}, README, "abc")
    assert gpu_report.problems({"untested": ""}, README, "abc")


def test_digest_covers_kernels_and_what_feeds_them(tmp_path):
    names = ["cuda/norm.cuh", "cuda/norm_cuda.cu", "check.h", "ops.cpp", "linear.cpp"]
    for name in [*names, "cpu/norm_cpu.cpp"]:
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")
    before = gpu_report.digest(tmp_path)
    (tmp_path / "csrc/cpu/norm_cpu.cpp").write_text("second")
    assert gpu_report.digest(tmp_path) == before
    for name in names:
        (tmp_path / "csrc" / name).write_text("second")
        after = gpu_report.digest(tmp_path)
        assert after != before, name
        before = after


@pytest.mark.parametrize(
    ("tool", "text", "errors"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", 0),
        ("memcheck", "========= ERROR SUMMARY: 3 errors\n", 3),
        ("memcheck", "killed half way", 1),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        (
            "initcheck",
            "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at cublas_kernel+0x10\n"
            "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at void dora_ext::norm+0x1\n"
            "========= ERROR SUMMARY: 2 errors\n",
            1,
        ),
    ],
)
def test_sanitizer_summaries_are_read(tool, text, errors):
    assert gpu_report.summary(text, tool) == errors


@pytest.fixture
def out(monkeypatch, tmp_path):
    """Where a report goes, on a machine whose GPU and sanitizer find nothing wrong."""
    import torch

    monkeypatch.setattr(gpu_report, "digest", lambda: "abc")
    monkeypatch.setattr(gpu_report.shutil, "which", lambda *_args, **_options: "/usr/bin/true")
    for name, value in (("is_available", True), ("get_device_name", "a GPU"), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(gpu_report.subprocess, "run", lambda *_args, **_options: SimpleNamespace(stdout="1.0"))
    monkeypatch.setattr(gpu_report, "run_suite", lambda _work: GOOD["pytest"])
    monkeypatch.setattr(gpu_report, "run_sanitizer", lambda _path, tool, _work: GOOD["sanitizer"][tool])
    return tmp_path / "report.json"


def test_parts_measured_alone_keep_the_others_results(monkeypatch, out):
    def measured(*parts):
        report = gpu_report.measure(out, list(parts))
        assert json.loads(out.read_text()) == report
        return gpu_report.problems(report, "", "abc")

    assert len(measured("pytest")) == len(gpu_report.TOOLS)
    assert len(measured("memcheck", "racecheck")) == 2
    assert measured("initcheck", "synccheck") == []
    monkeypatch.setattr(gpu_report, "digest", lambda: "other sources")
    assert set(gpu_report.measure(out, ["memcheck"])["sanitizer"]) == {"memcheck"}
    assert gpu_report.measure(out, ["memcheck"])["pytest"] == {}


def test_a_part_that_has_ended_is_written_down_while_others_run(monkeypatch, out):
    def cut_off(_path, tool, _work):
        if tool == "racecheck":
            while not out.exists() or "memcheck" not in json.loads(out.read_text())["sanitizer"]:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return GOOD["sanitizer"][tool]

    monkeypatch.setattr(gpu_report, "run_sanitizer", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu_report.measure(out, ["memcheck", "racecheck"])
    assert json.loads(out.read_text())["sanitizer"] == {"memcheck": GOOD["sanitizer"]["memcheck"]}


def test_shares_of_a_tool_add_up(monkeypatch, tmp_path):
    given = []

    def run_share(_path, _tool, _work, name, tests):
        given.extend(tests)
        share = {"passed": 2, "failed": 1, "skipped": 0, "passed_cuda": 1, "errors": 3, "failures": [name]}
        return share | ({"timed_out": True} if name == "initcheck1" else {})

    monkeypatch.setattr(gpu_report, "run_share", run_share)
    total, shares = gpu_report.run_sanitizer("", "initcheck", tmp_path), gpu_report.SHARES["initcheck"]
    assert sorted(given) == sorted(gpu_report.KERNEL_TESTS)
    assert (total["passed"], total["failed"], total["errors"]) == (2 * shares, shares, 3 * shares)
    assert len(total["failures"]) == shares and total["timed_out"]
    assert "timed_out" not in gpu_report.run_sanitizer("", "memcheck", tmp_path)


def test_failures_have_names(tmp_path):
    xml = tmp_path / "suite.xml"
    xml.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">'
        '<testcase classname="tests.test_norm" name="test_a[cuda]"/>'
        '<testcase classname="tests.test_norm" name="test_b"><failure message="no"/></testcase>'
        '<testcase classname="tests.test_norm" name="test_c"><error message="no"/></testcase>'
        '<testcase classname="tests.test_norm" name="test_d"><skipped message="no CUDA device"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = gpu_report.count(xml)
    assert found["failures"] == ["tests.test_norm::test_b", "tests.test_norm::test_c"]
    assert (found["passed"], found["failed"], found["skipped"], found["passed_cuda"]) == (1, 2, 1, 1)
    assert found["skips"] == ["no CUDA device"]
