"""The GPU results that travel with the code, since continuous integration has no GPU.

python tests/gpu_report.py [--out FILE]      on a GPU machine: all tests, and the kernel tests under each
                                             compute-sanitizer tool; writes tests/gpu_report.json
    --only pytest                            a part; the others' results stay, if they are of these very sources
python tests/gpu_report.py --untested WHY    writes a report that says so; README's status line must then, too
python tests/gpu_report.py --check           does the report belong to these sources, and is it good?
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
PARTS = ["pytest", *TOOLS]
# Tests that launch our kernels directly; under a sanitizer a few sizes of each are enough, and all there is time for.
KERNEL_TESTS = [
    "test_norm",
    "test_norm_kernels",
    "test_norm_nf4",
    "test_norm_nf4_kernels",
    "test_compose",
    "test_recover",
    "test_linear_op",
    "test_layer_products",
    "test_embedding_op",
    "test_nf4",
    "test_decode",
    "test_product",
    "test_product_first",
    "test_product_last",
    "test_product_norms",
    "test_adapter_backward",
    "test_feature_gradients",
]
# Without torch's caching allocator no graph can be captured, and a failed capture leaves its mark on what follows;
# compilers and tracers around a kernel change nothing in it; billions of weights take too long.
NOT_UNDER_A_SANITIZER = "not captur and not compile and not opcheck and not 2_to_the_31"
CASES_PER_TEST = {"memcheck": 4, "racecheck": 4, "initcheck": 2, "synccheck": 4}  # initcheck instruments torch's too
SECONDS_PER_TOOL = 480
# What the library's half-precision products do on Hopper, two tools can't follow: racecheck itself breaks off ("failed
# to handle a hardware exception"; it knows no wgmma either), and to initcheck what the TMA wrote was never written. The
# kernels around those products have tests of their own.
WITHOUT_HALF_PRODUCTS = (
    " and not test_product and not test_layer_products and not composed"
    " and (not (test_linear_op or test_embedding_op) or float32 or float64)"
)
# torch sums the float64 reference of a vocabulary in a way that initcheck reports, at length, again and again.
ONLY = {"racecheck": WITHOUT_HALF_PRODUCTS, "initcheck": WITHOUT_HALF_PRODUCTS + " and not vocabularies"}
# Instrumented kernels are slow, and a sanitizer runs them one by one: so many processes share the files.
SHARES = {"memcheck": 1, "racecheck": 2, "initcheck": 6, "synccheck": 1}


def digest(root: Path = ROOT) -> str:
    """sha256 over everything that the GPU runs or that feeds it: csrc/cuda, shared headers, schemas, compositions."""
    csrc = root / "csrc"
    files = [p for p in csrc.glob("cuda/*") if p.is_file()] + [*csrc.glob("*.h"), *csrc.glob("*.cpp")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def problems(report: dict, readme: str, sources: str) -> list[str]:
    """What keeps this report from standing for sources with this digest; empty when nothing does."""
    reason = report.get("untested")
    if reason is not None:
        lines = [line for line in readme.splitlines() if "GPU" in line and "untested" in line and reason in line]
        told = bool(reason.strip()) and bool(lines)
        return (
            [] if told else [f"the GPU code is untested ({reason!r}), but no line of README.md says so with the reason"]
        )
    if report.get("digest") != sources:
        return ["the CUDA sources changed after tests/gpu_report.json was written: run make gpu-test on a GPU machine"]
    found = []
    tests = report.get("pytest", {})
    if tests.get("failed", 1) or not tests.get("passed_cuda"):
        found.append(f"tests on the GPU: {tests}")
    for tool in TOOLS:
        result = report.get("sanitizer", {}).get(tool, {})
        bad = result.get("errors", 1) or result.get("failed", 1) or result.get("timed_out")
        if bad or not result.get("passed"):
            found.append(f"compute-sanitizer {tool}: {result}")
    return found


def count(xml: Path) -> dict:
    if not xml.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "passed_cuda": 0}  # it never got to its end
    suites = list(ElementTree.parse(xml).getroot().iter("testsuite"))
    total = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    bad = [case for s in suites for case in s.iter("testcase") if len(case)]
    on_gpu = [case for s in suites for case in s.iter("testcase") if not len(case) and "cuda" in case.get("name", "")]
    return {
        "passed": total["tests"] - total["failures"] - total["errors"] - total["skipped"],
        "failed": total["failures"] + total["errors"],
        "skipped": total["skipped"],
        "passed_cuda": len(on_gpu),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad if case[0].tag != "skipped"],
        "skips": sorted({case[0].get("message", "") for case in bad if case[0].tag == "skipped"}),
    }


def run_suite(work: Path) -> dict:
    xml, start = work / "suite.xml", time.monotonic()
    # Minutes on a GPU machine are dear: pytest-xdist, where it is installed, shares the suite among the cores. A thread
    # for each worker: OpenMP's, spinning for one another's cores, take several times as long.
    workers, environment = [], None
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "worksteal"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", f"--junitxml={xml}", "-q", "--durations=15", *workers]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return {**count(xml), "seconds": round(time.monotonic() - start)}


def kernel_filter(sanitizer: str) -> list[str]:
    """Only our kernels are instrumented. The option's name differs between releases."""
    options = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False).stdout
    return next(
        (["--" + name, "kns=dora_ext"] for name in ("kernel-regex", "kernel-name") if "--" + name in options), []
    )


def run_sanitizer(sanitizer: str, tool: str, work: Path) -> dict:
    start, shares = time.monotonic(), SHARES[tool]
    with ThreadPoolExecutor() as pool:
        files = [KERNEL_TESTS[i::shares] for i in range(shares)]
        results = list(pool.map(lambda i: run_share(sanitizer, tool, work, f"{tool}{i}", files[i]), range(shares)))
    total = {key: sum(r[key] for r in results) for key in ("passed", "failed", "skipped", "passed_cuda", "errors")}
    total["failures"] = [test for r in results for test in r.get("failures", [])]
    if any(r.get("timed_out") for r in results):
        total["timed_out"] = True
    return {**total, "seconds": round(time.monotonic() - start)}


def run_share(sanitizer: str, tool: str, work: Path, name: str, tests: list[str]) -> dict:
    files = [ROOT / "tests" / f"{test}.py" for test in tests]
    xml, log = work / f"{name}.xml", work / f"{name}.log"
    # Initialisation is seen only where the writer is instrumented too, and inputs are written by torch's kernels.
    ours = [] if tool == "initcheck" else kernel_filter(sanitizer)
    chosen = NOT_UNDER_A_SANITIZER + ONLY.get(tool, "")
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-k", chosen, f"--sample={CASES_PER_TEST[tool]}"]
    command = [
        sanitizer,
        "--tool",
        tool,
        *ours,
        *pytest,
        f"--junitxml={xml}",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    # torch's caching allocator would hide an access past the end of a tensor inside one large block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(SECONDS_PER_TOOL)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)  # the tool and the tests under it
            process.wait()
    text = log.read_text(errors="replace")
    result = {**count(xml), "errors": summary(text, tool)}
    if timed_out:
        result["timed_out"] = True
    if result["errors"] or result["failed"]:
        print(f"--- compute-sanitizer {tool}: {log}\n{text[-6000:]}")
    return result


def summary(text: str, tool: str) -> int:
    """Errors in a sanitizer's log; 1 if it has no summary, since nothing was then checked to the end."""
    if tool == "racecheck":
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
        return sum(int(hazards) for hazards, _, _ in found) if found else 1
    found = re.findall(r"ERROR SUMMARY: (\d+) errors?", text)
    if not found:
        return 1
    if tool == "initcheck":  # others' kernels are instrumented too: count what happened in ours
        return len(re.findall(r"Uninitialized [^\n]*\n(?:=+ +at [^\n]*dora_ext)", text))
    return sum(map(int, found))


def measure(out: Path, parts: list[str]) -> dict:
    """The report, which is written to `out` too."""
    import torch

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not torch.cuda.is_available() or not sanitizer:
        missing = "a CUDA device" if sanitizer else "compute-sanitizer (part of the CUDA toolkit)"
        raise SystemExit(f"make gpu-test needs {missing}; without it: --untested 'the reason'")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    report = {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "digest": digest(),
    }
    work = out.resolve().parent / "gpu_report_logs"
    work.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text()) if out.exists() else {}
    if before.get("digest") != report["digest"]:
        before = {}
    report["pytest"], report["sanitizer"] = before.get("pytest", {}), before.get("sanitizer", {})
    # Instrumentation keeps the processor busier than the GPU, so all run side by side. Each is written down when it
    # ends: where time runs out, --only has those left to do that did not.
    with ThreadPoolExecutor() as pool:
        running = {pool.submit(run_sanitizer, sanitizer, t, work): t for t in TOOLS if t in parts}
        if "pytest" in parts:
            running[pool.submit(run_suite, work)] = "pytest"
        for part in as_completed(running):
            where = report if running[part] == "pytest" else report["sanitizer"]
            where[running[part]] = part.result()
            write(report, out)
    return report


def write(report: dict, out: Path) -> None:
    """Whole or not at all, whenever this is cut off."""
    beside = out.with_name(out.name + ".new")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--untested", metavar="WHY")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    elif arguments.untested is not None:
        report = {"untested": arguments.untested, "digest": digest()}
        write(report, arguments.out)
    else:
        report = measure(arguments.out, arguments.only)
    readme = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    found = problems(report, readme, digest())
    print(json.dumps(report, indent=1))
    print("\n".join(f"gpu_report: {line}" for line in found) or "gpu_report: good")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
