"""Finding the compiled kernels: prebuilt ones when dora_ext is imported, just-in-time ones when load() is called."""

import importlib
import json
from pathlib import Path

import torch

module = None  # the extension, once loaded
origin = None  # "prebuilt" or "just in time"
_why_not = "dora_ext: its kernels are not compiled yet. Call dora_ext.load() once, or install with a compiler at hand."
_waiting = []


def build_facts() -> dict | None:
    """What the prebuilt extension was built for, read without loading it."""
    path = Path(__file__).with_name("_build_facts.json")
    return json.loads(path.read_text()) if path.exists() else None


def mismatch(facts: dict | None) -> str | None:
    """The C++ interface of torch changes with its minor version; a symbol error would be all that one sees."""
    if not facts or facts["torch"].split(".")[:2] == torch.__version__.split(".")[:2]:
        return None
    return (
        f"dora_ext: its kernels were built for torch {facts['torch']}, but torch {torch.__version__} is running. "
        "Reinstall dora_ext (pip install --no-build-isolation), or call dora_ext.load() to build them just in time."
    )


def when_loaded(function):
    """Runs `function` as soon as torch.ops.dora_ext exists: now, or at the end of load()."""
    if module is not None:
        function()
    else:
        _waiting.append(function)
    return function


def require() -> None:
    if module is None:
        raise RuntimeError(_why_not)


def _arrived(extension, how: str) -> None:
    global module, origin
    module, origin = extension, how
    while _waiting:
        _waiting.pop(0)()


def load_prebuilt() -> None:
    """Called by `import dora_ext`; never compiles and never raises: require() tells what went wrong."""
    global _why_not
    problem = mismatch(build_facts())
    if problem:
        _why_not = problem
        return
    try:
        _arrived(importlib.import_module("dora_ext._C"), "prebuilt")
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        _why_not = f"dora_ext: its prebuilt kernels do not load ({error}). Reinstall dora_ext, or call dora_ext.load()."
