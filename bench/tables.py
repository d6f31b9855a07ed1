"""python -m bench.tables --write README.md: puts the tables of bench/results/*.json between a page's markers.

<!-- bench: linear_step h100 -->
...
<!-- /bench -->
"""

import argparse
import json
import re
from pathlib import Path

from . import bench_error, bench_linear

RESULTS = Path(__file__).parent / "results"
TABLES = {bench.KEY: bench.table for bench in (bench_linear, bench_error)}
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
    return "\n".join([where + ".", *TABLES[key](data[key])]) + "\n"


def render(page: str, results: Path = RESULTS) -> str:
    return MARKERS.sub(lambda m: m[1] + section(m[2], m[3], results) + m[4], page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page whose tables to fill in")
    path = parser.parse_args().write
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
