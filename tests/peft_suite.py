"""PEFT's own tests of DoRA, once with PEFT's code and once with `dora_ext.integrations.peft.enable()`; both must agree.

    python tests/peft_suite.py UNPACKED_PEFT_SOURCE [pytest arguments]

takes the tests that say DoRA in their name and run without a GPU and downloads (what needs either fails or is skipped
in both runs, and counts as such). Exit status 1 if a single outcome differs. Extra arguments go to pytest, as `-x` or
`-k 'dora and conv'`. pytest does not collect this file; it loads it as a plugin in the two runs.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

# Imported by PEFT's test files for other tests than these; not worth an installation.
_NOT_NEEDED = {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline", "scipy": "stats"}
_outcomes: dict[str, dict] = {}
_count = None


def pytest_configure(config):
    global _count
    import peft  # noqa: F401  before the stand-ins below: it looks for some of these packages

    from dora_ext.integrations.peft import enable, forwards

    for name, attribute in _NOT_NEEDED.items():
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = ModuleSpec(name, None)
            setattr(stand_in, attribute, type(attribute, (), {}))
            sys.modules[name] = stand_in
    if os.environ["DORA_EXT_ENABLE"] == "1":
        enable()
    _count = lambda: forwards.calls["fused"]  # noqa: E731


def pytest_collection_modifyitems(items):
    for module in {item.module for item in items}:
        if hasattr(module, "hub_online_once"):  # offline stays offline: waiting for a download that fails takes minutes
            module.hub_online_once = contextlib.nullcontext


def pytest_runtest_setup(item):
    _outcomes[item.nodeid] = {"outcome": "passed", "why": "", "fused": -_count()}


def pytest_runtest_logreport(report):
    entry = _outcomes.get(report.nodeid)
    if entry is None:  # skipped by a mark, before its setup
        entry = _outcomes[report.nodeid] = {"outcome": "skipped", "why": "", "fused": -_count()}
    if report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        entry.update(outcome=report.outcome, why=crash.message.partition("\n")[0] if crash else "")
    if report.when == "teardown":
        entry["fused"] += _count()


def pytest_collectreport(report):
    if report.failed:
        _outcomes[report.nodeid] = {"outcome": "not collected", "why": str(report.longrepr).split("\n")[-1], "fused": 0}


def pytest_sessionfinish(session):
    Path(os.environ["DORA_EXT_OUTCOMES"]).write_text(json.dumps(_outcomes))


def run(folder: Path, enable: bool, arguments: list[str]) -> dict[str, dict]:
    """nodeid -> outcome, first line of the failure, calls that took the fused path."""
    here = Path(__file__).resolve().parent
    outcomes = folder / f"outcomes{int(enable)}.json"
    environment = dict(
        os.environ, DORA_EXT_ENABLE=str(int(enable)), DORA_EXT_OUTCOMES=str(outcomes), HF_HUB_OFFLINE="1",
        PYTHONPATH=os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    files = sorted(path for path in (folder / "tests").glob("test_*.py") if "gpu" not in path.name)
    files = [f"tests/{path.name}" for path in files if "dora" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir=.", "-p", "peft_suite", "-q", "--tb=no"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "--continue-on-collection-errors", "-k", "dora", *arguments]
    subprocess.run([*command, *files], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    return json.loads(outcomes.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="PEFT's unpacked source distribution")
    source, arguments = parser.parse_known_args()
    tests = source.source / "tests"
    if not (tests / "test_custom_models.py").exists():
        parser.error(f"source: expected a folder with tests/test_custom_models.py, got {source.source}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(tests, folder / "tests")
        (folder / "tests" / "__init__.py").touch()  # left out of the source distribution
        off, on = (run(folder, enable, arguments) for enable in (False, True))
    different = [name for name in off.keys() | on.keys() if _same(off.get(name)) != _same(on.get(name))]
    for title, outcomes in (("PEFT's code", off), ("enable()", on)):
        counts = Counter(entry["outcome"] for entry in outcomes.values())
        print(f"{title}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    reasons = Counter(e["why"][:100] for e in off.values() if e["outcome"] in ("failed", "not collected"))
    for why, n in reasons.most_common():
        print(f"  {n} fail with PEFT's own code: {why}")
    fused = [e["fused"] for e in on.values() if e["outcome"] == "passed"]
    print(f"{sum(map(bool, fused))} of {len(fused)} passed cases took the fused path, in {sum(fused)} layer calls")
    for name in sorted(different):
        print(f"DIFFERENT: {name}: {_same(off.get(name))}, with enable() {_same(on.get(name))}")
    passed = any(entry["outcome"] == "passed" for entry in on.values())
    return 0 if passed and not different else 1


def _same(entry: dict | None) -> str | None:
    return entry and entry["outcome"]


if __name__ == "__main__":
    sys.exit(main())
