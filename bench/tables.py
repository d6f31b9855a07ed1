"""python -m bench.tables --write README.md: puts the tables of bench/results/*.json between a page's markers.

<!-- bench: linear_step h100 -->
...
<!-- /bench -->
"""

import argparse
import json
import re
from pathlib import Path

from . import bench_distributed
from .benches import BENCHES

RESULTS = Path(__file__).parent / "results"
TABLES = {bench.KEY: bench.table for bench in BENCHES.values()} | {"distributed": bench_distributed.table}
GPU_REPORT = RESULTS.parents[1] / "tests" / "gpu_report.json"
STATUS = re.compile(r"(<!-- gpu status -->\n).*?(<!-- /gpu status -->)", re.DOTALL)
MARKERS = re.compile(r"(<!-- bench: (\w+) (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def section(key: str, stem: str, results: Path = RESULTS) -> str:
    path = results / f"{stem}.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    if key not in data:
        return "not measured yet\n"
    f = data["facts"]
    where = f"{f['device']}, torch {f['torch']}, PEFT {f['peft']}, commit {f['commit']}, {f['date']}"
    if "threads" in f:
        where += f", {f['threads']} threads"
    if "settings" in data:  # of a model's steps, which cost more under FSDP2, on one rank too
        engine, keep = data["settings"]["engine"], data["settings"]["keep"]
        where += f", --engine {engine}{' --keep' if keep else ''}"
    return "\n".join([where + ".", *TABLES[key](data[key])]) + "\n"


def gpu_status(report: Path = GPU_REPORT) -> str:
    """One line on the run of the GPU tests that travels with the code."""
    facts = json.loads(report.read_text()) if report.exists() else {"untested": "not run on a GPU yet"}
    if "untested" in facts:
        return f"GPU status: untested: {facts['untested']}\n"
    tests = facts["pytest"]
    tools = ", ".join(f"{tool} {result['errors']}" for tool, result in facts["sanitizer"].items())
    return (
        f"GPU status: {tests['passed']} tests passed ({tests['passed_cuda']} of them on the GPU), "
        f"{tests['failed']} failed; compute-sanitizer errors: {tools}. "
        f"{facts['device']}, torch {facts['torch']}, {facts['date']} ([report](tests/gpu_report.json)).\n"
    )


def render(page: str, results: Path = RESULTS, report: Path = GPU_REPORT) -> str:
    page = MARKERS.sub(lambda m: m[1] + section(m[2], m[3], results) + m[4], page)
    return STATUS.sub(lambda m: m[1] + gpu_status(report) + m[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page whose tables to fill in")
    path = parser.parse_args().write
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
