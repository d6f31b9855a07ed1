"""Builds dora_ext._C through torch's BuildExtension and ninja. Metadata is in pyproject.toml, sources and flags in
dora_ext/_build.py. torch must be installed first: pip install --no-build-isolation -e ."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "dora_ext is compiled against the torch that runs it, and torch is not here. Install torch first, then:\n"
        "    pip install --no-build-isolation dora-ext    (or -e . in a checkout)"
    ) from error

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("_build", ROOT / "dora_ext" / "_build.py")
_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_build)

try:
    cuda = _build.use_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    archs = _build.architectures(cuda)
except _build.BuildError as error:
    raise SystemExit(f"error: {error}") from None
_build.find_ninja()


class BuildExtension(cpp_extension.BuildExtension):
    """Writes what the extension was built for beside it, where it can be read without loading the extension."""

    def finalize_options(self):
        super().finalize_options()
        # pip would compile in a fresh folder each time; and objects made for one torch must not be linked for another.
        backend = "cuda" if cuda else "cpu"
        self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}-{backend}")

    def run(self):
        super().run()
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda if cuda else None, "architectures": archs}
        for extension in self.extensions:
            path = Path(self.get_ext_fullpath(extension.name)).with_name("_build_facts.json")
            path.write_text(json.dumps(facts, indent=1) + "\n")


class BuildPy(build_py):
    """csrc lives beside the package in the repository and inside it once installed, for dora_ext.load()."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dora_ext" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
    "dora_ext._C",
    [os.path.join("csrc", source) for source in _build.sources(cuda)],
    include_dirs=[str(ROOT / "csrc")],
    extra_compile_args={
        "cxx": _build.CXX_FLAGS + _build.fact_flags(archs),
        "nvcc": _build.NVCC_FLAGS + _build.gencode_flags(archs),
    },
    extra_link_args=_build.LINK_FLAGS,
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension, "build_py": BuildPy})
