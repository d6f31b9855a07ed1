"""Finding the compiled kernels: prebuilt ones when dora_ext is imported, just-in-time ones when load() is called."""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import threading
import time
from pathlib import Path

import torch

from dora_ext import _build

NAME = "dora_ext_jit"
module = None  # the extension, once loaded
origin = None  # "prebuilt" or "just in time"
_jit_digest = None
_waiting = []
_why_not = "dora_ext: its kernels are not compiled yet: call dora_ext.load() once, before the first op."


def why_not() -> str | None:
    """Why there are no kernels; None when there are."""
    return _why_not if module is None else None


def require() -> None:
    """Every public function of an op starts with it."""
    if module is None:
        raise RuntimeError(_why_not)


def when_loaded(function) -> None:
    """Runs `function` as soon as the ops are registered: now, or at the end of load()."""
    if module is not None:
        function()
    else:
        _waiting.append(function)


def build_facts() -> dict | None:
    """What the prebuilt extension was built for, read without loading it."""
    path = _build.PACKAGE / "_build_facts.json"
    return json.loads(path.read_text()) if path.exists() else None


def mismatch(facts: dict | None) -> str | None:
    """torch's C++ interface changes with its minor version; an undefined symbol would be all that one is told."""
    if not facts or facts["torch"].split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return (
        f"dora_ext: its prebuilt kernels are for torch {facts['torch']}, but torch {torch.__version__} is running. "
        "Reinstall dora_ext with pip install --no-build-isolation, or call dora_ext.load() to build them just in time."
    )


def load_prebuilt() -> None:
    """Called by `import dora_ext`; never compiles, never raises. Without kernels, every op tells why."""
    global _why_not
    problem = mismatch(build_facts())
    if problem:
        _why_not = problem
        return
    try:
        extension = importlib.import_module("dora_ext._C")
    except ModuleNotFoundError:
        return
    except ImportError as error:
        _why_not = f"dora_ext: its prebuilt kernels do not load ({error}). Reinstall it, or call dora_ext.load()."
        return
    _arrived(extension, "prebuilt")


def load(verbose: bool = True) -> None:
    """Makes the kernels available: the prebuilt ones where there are any, otherwise built just in time.

    The build takes minutes, once: its result is kept under TORCH_EXTENSIONS_DIR (or torch's default cache) for later
    processes. It needs a C++ compiler, Python's headers and ninja; nvcc too for CUDA kernels (DORA_EXT_CUDA=0|1
    overrides the choice, TORCH_CUDA_ARCH_LIST the architectures). `verbose` prints a line for each step.

    Raises:
        BuildError: something needed is missing, or the sources changed after they were loaded.
        RuntimeError: a source did not compile; the compiler's words are in the message.
    """
    global _jit_digest
    if module is not None:
        if origin == "just in time" and _build.digest() != _jit_digest:
            raise _build.BuildError(
                f"the sources in {_build.csrc()} changed after they were loaded, and a process can register its ops "
                "only once: restart the kernel (or the Python process), then call dora_ext.load() again"
            )
        return
    from torch.utils import cpp_extension

    digest = _build.digest()
    cuda = _build.use_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    archs = _jit_architectures(cuda)
    directory = build_folder(digest, cuda, archs)
    say = print if verbose else lambda *_: None

    directory.mkdir(parents=True, exist_ok=True)
    # The kernel drops this lock with its holder, so whoever has it knows that nobody else builds here.
    with open(directory / "builder", "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"dora_ext: another process is building in {directory}, waiting for it")
            fcntl.flock(guard, fcntl.LOCK_EX)
        done = directory / "complete"
        if done.exists():
            spec = importlib.util.spec_from_file_location(NAME, directory / f"{NAME}.so")
            extension = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(extension)
        else:
            _check_tools()
            # torch's own lock outlives a killed build, and torch waits for it for ever.
            lock = directory / "lock"
            if lock.exists():
                say(f"dora_ext: a build that was killed left {lock}; removed, building again")
                lock.unlink()
            extension = _compile(cpp_extension, directory, cuda, archs, say)
            done.touch()
    _jit_digest = digest
    _arrived(extension, "just in time")


def _arrived(extension, how: str) -> None:
    global module, origin
    module, origin = extension, how
    while _waiting:
        _waiting.pop(0)()


def build_folder(digest: str, cuda: bool, archs: list[str]) -> Path:
    """Where the just-in-time build for this torch, this Python and these sources lives."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(json.dumps([digest, torch.__version__, sys.version, cuda, archs]).encode()).hexdigest()[:12]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return root / f"dora_ext-torch{torch.__version__}-{key}"


def _jit_architectures(cuda: bool) -> list[str]:
    """The GPUs that are here, where there are any: the wider default takes several times as long."""
    if cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}" for major, minor in sorted(seen)]
    return _build.architectures(cuda)


def _check_tools() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        raise _build.BuildError(f"no C++ compiler: {compiler} was not found; install g++ (apt install g++), or set CXX")
    if not _build.find_ninja():
        raise _build.BuildError("ninja was not found: pip install ninja")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise _build.BuildError(f"Python's headers are missing ({header}): apt install python3-dev, or its like")


def _compile(cpp_extension, directory: Path, cuda: bool, archs: list[str], say):
    sources = _build.sources(cuda)
    what = f"{len(sources)} sources for " + (f"CPU and CUDA ({', '.join(archs)})" if cuda else "the CPU")
    say(f"dora_ext: compiling {what}, once, in {directory}")
    start, finished = time.monotonic(), threading.Event()
    reporter = threading.Thread(target=_report, args=(directory, len(sources) + 1, start, finished, say), daemon=True)
    reporter.start()
    # torch builds a name once in a process, even if that failed: without this a second try would not compile at all.
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(NAME, None)
    try:
        extension = cpp_extension.load(
            name=NAME,
            sources=[str(_build.csrc() / source) for source in sources],
            extra_cflags=_build.CXX_FLAGS + _build.fact_flags(archs),
            extra_cuda_cflags=_build.NVCC_FLAGS + _build.gencode_flags(archs),
            extra_ldflags=_build.LINK_FLAGS,
            extra_include_paths=[str(_build.csrc())],
            build_directory=str(directory),
            with_cuda=cuda,
        )
    finally:
        finished.set()
        reporter.join()
    say(f"dora_ext: compiled in {time.monotonic() - start:.0f} s")
    return extension


def _report(directory: Path, steps: int, start: float, finished: threading.Event, say) -> None:
    """Says what ninja has finished: it appends a line to its log for each object."""
    log = directory / ".ninja_log"
    base = told = len(_finished_objects(log))  # some may be left of a build that did not get to its end
    while not finished.wait(0.2):
        objects = _finished_objects(log)
        for name in objects[told:]:
            told += 1
            say(f"dora_ext: [{told - base}/{steps - base}] {name} ({time.monotonic() - start:.0f} s)")


def _finished_objects(log: Path) -> list[str]:
    if not log.exists():
        return []
    lines = [line.split("\t") for line in log.read_text().splitlines() if not line.startswith("#")]
    return list(dict.fromkeys(fields[3] for fields in lines if len(fields) == 5))
