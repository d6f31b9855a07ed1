"""The one list of sources and flags. setup.py, dora_ext.load() and CMakeLists.txt all take it from here.

Rules:
- This file imports neither torch nor dora_ext: setup.py and CMake read it before either can be imported.
- csrc/*.cpp and csrc/cpu/*.cpp are in every build; csrc/cuda/*.cu are added for CUDA and nothing else changes, so
  leaving them out is the CPU-only build, without an #ifdef. A new file in these folders is in the build by being there.
- No two sources share a stem, in whatever folder: torch's builder names objects by it. tests/test_build.py checks that.
- No -std: the running torch chooses it (C++17 for 2.11, C++20 from 2.13). No -march: one wheel runs on every CPU, the
  instruction set is chosen at run time. No --use_fast_math.
- The flags for architectures are ours, not torch's (which drops its own where an nvcc flag contains "arch"): 9.0 means
  sm_90a here. Hopper's own instructions exist in no other code, and no other device has capability 9.0.
"""

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# at::parallel_for runs on one thread unless the extension itself is compiled with -fopenmp.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fopenmp,-fvisibility=hidden"]
LINK_FLAGS = ["-fopenmp"]

# Turing, Ampere (both), Ada, Hopper, and PTX for what comes after.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"
# Names that torch takes too.
GENERATIONS = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class BuildError(RuntimeError):
    """What was asked for cannot be built here; the message says what is missing."""


def csrc() -> Path:
    """csrc inside the package when installed, beside it in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def cpu_sources() -> list[str]:
    """The sources of every build, relative to csrc."""
    return _glob("*.cpp") + _glob("cpu/*.cpp")


def cuda_sources() -> list[str]:
    return _glob("cuda/*.cu")


def sources(cuda: bool) -> list[str]:
    return cpu_sources() + (cuda_sources() if cuda else [])


def digest() -> str:
    """sha256 over every file under csrc and over this list: the name of a just-in-time build."""
    total = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(csrc().rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            total.update(path.relative_to(csrc()).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def use_cuda(torch_cuda: str | None, cuda_home: str | None) -> bool:
    """CUDA when torch was built with it and a toolkit is here; DORA_EXT_CUDA=0|1 overrides."""
    wish = os.environ.get("DORA_EXT_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise BuildError(f"DORA_EXT_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return False
    missing = []
    if not torch_cuda:
        missing.append("the installed torch is a CPU build (torch.version.cuda is None): install a CUDA build of torch")
    cuda_home = cuda_home or os.environ.get("CUDA_HOME")  # a CPU build of torch does not look for one
    if not cuda_home and not shutil.which("nvcc"):
        missing.append("no CUDA toolkit was found: set CUDA_HOME, or put nvcc on the PATH")
    elif cuda_home and not shutil.which("nvcc", path=os.path.join(cuda_home, "bin")):
        missing.append(f"CUDA_HOME is {cuda_home}, but there is no bin/nvcc in it")
    if missing and wish == "1":
        raise BuildError("DORA_EXT_CUDA=1 asks for CUDA kernels, but " + "; and ".join(missing))
    return not missing


def architectures(cuda: bool) -> list[str]:
    """Compute capabilities to compile for; TORCH_CUDA_ARCH_LIST is honoured."""
    if not cuda:
        return []
    chosen = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, ") or DEFAULT_ARCHITECTURES)
    archs = [arch for name in chosen for arch in GENERATIONS.get(name, name).split(";")]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]
    if wrong:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {wrong[0]!r}")
    return archs


def gencode_flags(archs: list[str] | None = None) -> list[str]:
    """nvcc's flags for these architectures, by default those of architectures()."""
    flags = []
    for arch in architectures(True) if archs is None else archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        exact = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{exact},code=sm_{exact}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def fact_flags(archs: list[str]) -> list[str]:
    """What module.cpp reports about its own build. Commas, because semicolons would need quoting on the way."""
    return ["-DDORA_EXT_ARCHITECTURES=" + ",".join(archs)]


def find_ninja() -> str | None:
    """ninja, also where pip put it beside a python that was called by its path; torch looks on the PATH alone."""
    scripts = sysconfig.get_path("scripts")
    if not shutil.which("ninja") and shutil.which("ninja", path=scripts):
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + scripts
    return shutil.which("ninja")


def _glob(pattern: str) -> list[str]:
    return sorted(path.relative_to(csrc()).as_posix() for path in csrc().glob(pattern))


if __name__ == "__main__":  # for CMake: python _build.py cpu_sources, one value or a ;-list on standard output
    values = globals()[sys.argv[1]]
    values = values() if callable(values) else values
    print(";".join([values] if isinstance(values, str) else [str(v) for v in values]), end="")
