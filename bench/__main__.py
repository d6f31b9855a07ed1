"""python -m bench [op ...]: writes bench/results/<device>.json, and with --plot draws it beside that.

On CUDA every row of times says its floor: the time for the operations and bytes that no implementation does without
(`work` in each bench_<op>.py) at the rates measured in the same run. A rival that fails is written down with its error
and the rest goes on. Tables come last: the end of a log has them.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from . import measure, plot
from .benches import BENCHES

RESULTS = Path(__file__).parent / "results"


def stem(device: str) -> str:
    """The results' file name: NVIDIA H100 80GB HBM3 is h100, NVIDIA GeForce RTX 4090 is rtx4090."""
    if device == "cpu":
        return "cpu"
    words = [w for w in torch.cuda.get_device_name().lower().split() if w not in ("nvidia", "geforce", "tesla")]
    return "".join(words[:2]) if words[0] in ("rtx", "gtx", "titan") else words[0].partition("-")[0]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def facts(device: str, commit: str | None) -> dict:
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "torch": torch.__version__,
        "peft": _version("peft"),
        "bitsandbytes": _version("bitsandbytes"),
        "python": platform.python_version(),
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--exclude=*") or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        found |= {"cuda": torch.version.cuda, "driver": _output(*query) or "unknown"}
    else:
        found |= {"threads": torch.get_num_threads()}
    return found


def add_floors(bench, results: dict) -> None:
    """Errors have no floor, kernels have theirs in each cell already; a CPU's rates are not measured."""
    if "ceilings" in results and hasattr(bench, "work"):
        for row in results[bench.KEY]:
            row["floor_ms"] = measure.floor_ms(*bench.work(row), results["ceilings"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats; written only with --out")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/<device>.json)")
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parser.add_argument("--plot", action="store_true", help="draw times over floors as a PNG beside the JSON")
    args = parser.parse_args(argv)
    unknown = set(args.ops) - set(BENCHES)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}: choose from {', '.join(BENCHES)}")
    chosen = {name: BENCHES[name] for name in (args.ops or BENCHES)}
    out = args.out or (None if args.quick else RESULTS / f"{stem(args.device)}.json")
    if args.plot and (plot.MISSING or out is None):
        parser.error(f"--plot: {plot.MISSING or 'a quick run is written only with --out'}")

    start = time.perf_counter()

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    found = facts(args.device, args.commit)
    # Results of ops that do not run now stay only if they come from the same commit and device.
    previous = json.loads(out.read_text()) if out and out.exists() else {}
    same = all(previous.get("facts", {}).get(k) == found[k] for k in ("device", "commit", "torch"))
    results = (previous if same else {}) | {"facts": found}
    if args.device == "cuda":
        results["ceilings"] = measure.ceilings()
    for name, bench in chosen.items():
        note(name)
        results[bench.KEY] = bench.run(args.device, args.quick, note)
        add_floors(bench, results)
        if out:
            # After each op: a run that is cut short keeps what it has.
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot.draw(results, out.with_suffix(".png"))
    print(json.dumps(results["facts"] | results.get("ceilings", {})))
    for bench in chosen.values():
        print(f"\n{bench.TITLE}\n")
        print("\n".join(bench.table(results[bench.KEY])))
        for row in results[bench.KEY]:
            for rival, result in row["rivals"].items():
                if "error" in result:
                    print(f"{rival} failed: {result['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
