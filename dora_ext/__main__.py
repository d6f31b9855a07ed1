"""python -m dora_ext: which kernels are here, what they were built for, and what is running."""

import platform

import torch

import dora_ext
from dora_ext import _build, _load


def report() -> list[tuple[str, str]]:
    rows = [
        ("dora_ext", f"{dora_ext.__version__}, {_build.PACKAGE}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            rows.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    facts = _load.build_facts()
    if facts:
        rows.append(("prebuilt for", f"torch {facts['torch']}, CUDA {facts['cuda'] or 'none'}"))
    extension = _load.module
    if extension is None:
        return [*rows, ("kernels", "none"), ("reason", _load.why_not())]
    return [
        *rows,
        ("kernels", f"{_load.origin}, {extension.__file__}"),
        ("built with", f"torch {extension.torch_version}, {extension.compiler}"),
        ("backends", ", ".join(backends())),
        ("architectures", extension.architectures.replace(",", ", ") or "none (CPU only)"),
    ]


def backends() -> list[str]:
    """Asked of torch's dispatcher, which knows what was registered."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [key.lower() for key in ("CPU", "CUDA") if has("dora_ext::norm", key)]


if __name__ == "__main__":
    rows = report()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    raise SystemExit(0 if _load.module is not None else 1)
