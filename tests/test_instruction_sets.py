"""The loops for lesser processors than this one answer as well (csrc/cpu/kernels_cpu.cpp chooses once a process)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Those that call the CPU's loops; products are large enough for their own code only in test_linear_op.
FILES = ["adapter_backward", "compose", "decode_cpu", "embedding_op", "linear_op", "nf4", "norm", "norm_nf4"]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_tests_of_the_loops_pass(capability, tmp_path):
    # What torch.compile has left in the usual place is of this processor's own instructions.
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    files = [str(HERE / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda", *files]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
