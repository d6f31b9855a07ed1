"""The list of sources and flags, the choice of backend, `python -m dora_ext`, and load()."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import dora_ext
from dora_ext import _build, _load

ROOT = Path(__file__).resolve().parent.parent
CSRC = _build.csrc()


def run_python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    # Elsewhere than here: the folder that Python starts in comes before PYTHONPATH.
    folder = environment.get("PYTHONPATH", ROOT)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=folder)


@pytest.fixture
def bare_package(tmp_path):
    """A copy of the package without kernels and without csrc; environment variables to run Python with it."""
    shutil.copytree(
        _build.PACKAGE, tmp_path / "dora_ext", ignore=shutil.ignore_patterns("*.so", "_build_facts.json", "__pycache__")
    )
    # An editable installation would lend its _C to the copy: its import hook is taken out again.
    hooks = "[f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']"
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n\nsys.meta_path[:] = {hooks}\n")
    return tmp_path / "dora_ext", {"PYTHONPATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


# The list


def test_every_source_is_listed_and_no_two_share_a_stem():
    listed = _build.sources(cuda=True)
    assert {CSRC / s for s in listed} == {p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu")}
    shared = [stem for stem, n in Counter(Path(s).stem for s in listed).items() if n > 1]
    assert not shared, f"torch's builder names objects by stem: {shared}"
    assert not any(s.startswith("cuda") for s in _build.sources(cuda=False))


def test_flags_leave_the_standard_to_torch_and_arithmetic_alone():
    flags = _build.CXX_FLAGS + _build.NVCC_FLAGS
    assert not [f for f in flags if f.startswith(("-std", "-march")) or "fast_math" in f]


def test_hopper_gets_code_with_its_own_instructions_and_ptx_that_others_can_read():
    flags = _build.gencode_flags(["8.0", "9.0+PTX"])
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert _build.gencode_flags(["9.0a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert _build.gencode_flags([]) == []
    answer = run_python("-S", ROOT / "dora_ext/_build.py", "gencode_flags", TORCH_CUDA_ARCH_LIST="7.5,12.0")
    assert answer.stdout == "-gencode=arch=compute_75,code=sm_75;-gencode=arch=compute_120,code=sm_120"


def test_the_list_needs_neither_torch_nor_the_package():
    tree = ast.parse((ROOT / "dora_ext/_build.py").read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names | {"pathlib"}
    answer = run_python("-S", ROOT / "dora_ext/_build.py", "cpu_sources")
    assert answer.stdout.split(";") == _build.cpu_sources()


def test_sources_keep_the_rules_of_the_house():
    for path in CSRC.rglob("*.*"):
        text = path.read_text()
        assert not re.search(r"#include <(torch/extension|torch/torch|ATen/ATen)\.h>", text), f"{path}: slow to compile"
        assert "WITH_CUDA" not in text, f"{path}: the list decides what is built"
        if path.suffix == ".cuh":
            assert not re.search(r"#include <(torch|ATen|c10)/", text), f"{path}: kernels hold no torch headers"


# CPU or CUDA


@pytest.fixture
def toolkit(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    return str(tmp_path)


def test_cuda_is_chosen_where_torch_and_a_toolkit_have_it(monkeypatch, toolkit):
    monkeypatch.delenv("DORA_EXT_CUDA", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    assert _build.use_cuda("13.0", toolkit)
    assert not _build.use_cuda(None, toolkit)
    assert not _build.use_cuda("13.0", None)
    assert not _build.use_cuda("13.0", "/nowhere")
    monkeypatch.setenv("DORA_EXT_CUDA", "0")
    assert not _build.use_cuda("13.0", toolkit)
    monkeypatch.setenv("DORA_EXT_CUDA", "1")
    assert _build.use_cuda("13.0", toolkit)


@pytest.mark.parametrize(
    ("torch_cuda", "home", "missing"),
    [
        (None, "toolkit", "CPU build"),
        ("13.0", None, "no CUDA toolkit"),
        ("13.0", "/nowhere", "/nowhere, but there is no bin/nvcc"),
        (None, None, "CPU build.*and no CUDA toolkit"),
    ],
)
def test_cuda_asked_for_and_not_able_says_what_is_missing(monkeypatch, toolkit, torch_cuda, home, missing):
    monkeypatch.setenv("DORA_EXT_CUDA", "1")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(_build.BuildError, match=f"DORA_EXT_CUDA=1 asks for CUDA kernels, but.*{missing}"):
        _build.use_cuda(torch_cuda, toolkit if home == "toolkit" else home)


def test_setup_says_what_is_missing():
    result = run_python(ROOT / "setup.py", "--version", DORA_EXT_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "/nowhere, but there is no bin/nvcc" in result.stderr


def test_other_values_of_the_override_are_refused(monkeypatch):
    monkeypatch.setenv("DORA_EXT_CUDA", "yes")
    with pytest.raises(_build.BuildError, match="expected 0 or 1, got 'yes'"):
        _build.use_cuda("13.0", "/usr")


def test_architecture_list_is_honoured(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert _build.architectures(cuda=True) == ["8.0", "9.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;9.0")
    assert _build.architectures(cuda=True) == ["8.0", "8.6+PTX", "9.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;native")
    with pytest.raises(_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST: expected numbers .* got 'native'"):
        _build.architectures(cuda=True)
    assert _build.architectures(cuda=False) == []
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert _build.architectures(cuda=True) == _build.DEFAULT_ARCHITECTURES.split(";")
    assert _build.architectures(cuda=False) == []


# What is here


def test_python_m_dora_ext_tells_what_is_here():
    result = run_python("-m", "dora_ext")
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith(("built", "pre")))
    assert result.returncode == 0, result.stderr
    assert rows["torch"].startswith(torch.__version__)
    assert rows["kernels"].startswith("prebuilt")
    assert rows["backends"].startswith("cpu")


def test_without_kernels_import_works_and_ops_ask_for_load(bare_package):
    _, environment = bare_package
    code = "import torch; from dora_ext.ops import weight_norm; weight_norm(*torch.ones(3, 2, 2), scaling=1.0)"
    result = run_python("-c", code, **environment)
    assert "RuntimeError" in result.stderr and "call dora_ext.load()" in result.stderr
    report = run_python("-m", "dora_ext", **environment)
    assert report.returncode == 1 and "none" in report.stdout and "dora_ext.load()" in report.stdout


def test_kernels_for_another_torch_are_refused_with_both_versions(bare_package):
    package, environment = bare_package
    (package / "_build_facts.json").write_text('{"torch": "2.5.1", "cuda": null, "architectures": []}')
    (package / "_C.so").write_bytes(b"never opened")
    report = run_python("-m", "dora_ext", **environment)
    assert report.returncode == 1
    assert f"for torch 2.5.1, but torch {torch.__version__} is running" in report.stdout
    assert "Traceback" not in report.stderr


def test_a_broken_library_is_reported_when_an_op_is_used(bare_package):
    package, environment = bare_package
    (package / "_C.so").write_bytes(b"not a library")
    report = run_python("-m", "dora_ext", **environment)
    assert report.returncode == 1 and "prebuilt kernels do not load" in report.stdout


# load()


def test_load_prefers_prebuilt_kernels(capsys):
    before = _load.module
    dora_ext.load()
    assert _load.module is before and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("hide", "message"),
    [
        ("os.environ['CXX'] = '/nowhere/c++'", "no C++ compiler: /nowhere/c++ was not found"),
        ("_build.find_ninja = lambda: None", "ninja was not found: pip install ninja"),
        ("sysconfig.get_path = lambda *_: '/nowhere'", "Python's headers are missing (/nowhere/Python.h)"),
    ],
)
def test_load_says_which_tool_is_missing(bare_package, hide, message):
    package, environment = bare_package
    shutil.copytree(CSRC, package / "csrc")
    code = f"import os, sysconfig, dora_ext; from dora_ext import _build; {hide}; dora_ext.load()"
    result = run_python("-c", code, **environment, DORA_EXT_CUDA="0")
    assert result.returncode != 0 and "BuildError" in result.stderr and message in result.stderr


LOAD_IN_A_NOTEBOOK = """
import dora_ext
from dora_ext import _build, _load
csrc = _build.csrc()
good = (csrc / "module.cpp").read_text()
(csrc / "module.cpp").write_text("#error misspelt")
try:
    dora_ext.load()
except RuntimeError as error:
    print("REFUSED", "misspelt" in str(error))
(csrc / "module.cpp").write_text(good)
# As a build leaves it that was killed: torch's lock in the folder that is to be used.
folder = _load.build_folder(_build.digest(), False, [])
folder.mkdir(parents=True)
(folder / "lock").touch()
dora_ext.load()
print("LOADED", _load.origin)
dora_ext.load()
(csrc / "module.cpp").write_text(good + "// edited")
try:
    dora_ext.load()
except RuntimeError as error:
    print("EDITED", error)
(csrc / "module.cpp").write_text(good)
"""


def test_load_just_in_time(bare_package):
    """A whole life of load() on the schemas and the module alone, which compile in seconds."""
    package, environment = bare_package
    (package / "csrc").mkdir()
    for source in (CSRC / "ops.cpp", CSRC / "module.cpp", *CSRC.glob("*.h")):
        shutil.copy(source, package / "csrc")
    result = run_python("-c", LOAD_IN_A_NOTEBOOK, **environment, DORA_EXT_CUDA="0", MAX_JOBS="2")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "REFUSED True" in out  # the compiler's words
    assert re.search(r"a build that was killed left \S+lock; removed", out)
    assert re.search(r"\[\d/\d\] ops\.o \(\d+ s\)", out)
    assert "LOADED just in time" in out and out.count("compiled in") == 1
    assert re.search(r"EDITED .*changed after they were loaded.*restart the kernel", out)

    # Another process: from the cache, which needs no compiler.
    code = "import dora_ext; dora_ext.load(); from dora_ext import _load; print(_load.origin)"
    again = run_python("-c", code, **environment, DORA_EXT_CUDA="0", CXX="/nowhere/c++")
    assert again.stdout.strip() == "just in time", again.stderr
