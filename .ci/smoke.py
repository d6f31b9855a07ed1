"""Run outside the source tree, in an environment that has torch and dora_ext alone: import, (load), compute, check.

python smoke.py prebuilt|jit|missing [--cuda-build]
"""

import sys

import torch

import dora_ext
from dora_ext import _load, reference
from dora_ext.ops import weight_norm

kind, cuda_build = sys.argv[1], "--cuda-build" in sys.argv
print(f"{kind}: dora_ext {dora_ext.__version__} from {dora_ext.__file__}, torch {torch.__version__}")
weight, lora_A, lora_B = torch.randn(64, 96), torch.randn(8, 96), torch.randn(64, 8)

if kind != "prebuilt":
    assert _load.module is None, "these kernels were to be absent"
    try:
        weight_norm(weight, lora_A, lora_B, scaling=2.0)
    except RuntimeError as error:
        assert "dora_ext.load()" in str(error), error
    else:
        raise AssertionError("an op ran without kernels")
if kind == "jit":
    dora_ext.load()
    dora_ext.load()  # free
if kind == "missing":
    raise SystemExit(0)

assert _load.origin == {"prebuilt": "prebuilt", "jit": "just in time"}[kind], _load.origin
assert bool(_load.module.architectures) == cuda_build, _load.module.architectures
norm = weight_norm(weight, lora_A, lora_B, scaling=2.0)
expected = reference.weight_norm(weight.double(), lora_A.double(), lora_B.double(), 2.0)
torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-6)

layer = dora_ext.DoraLinear(96, 64, r=8, alpha=16)
x = torch.randn(5, 96, requires_grad=True)
layer(x).square().sum().backward()
assert x.grad is not None and x.grad.isfinite().all()
torch.testing.assert_close(layer(x), layer.to_base()(x), rtol=1e-4, atol=1e-5)
print(f"{kind}: computes")
