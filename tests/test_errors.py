"""A linear layer's errors against float64 are no larger than PEFT's, output by output."""

import pytest
import torch

from dora_ext.testing import DEVICES

pytest.importorskip("peft")

from bench.bench_error import OUTPUTS, errors_of
from bench.rivals import OURS, Problem
from bench.shapes import LinearShape

ROUNDING = 1.03  # two orders of the same sum differ by this much


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [LinearShape(256, 1024, 1024, 64), LinearShape(256, 2048, 1024, 16)], ids=str)
def test_no_larger_than_pefts(device, dtype, shape):
    problem = Problem.random(shape, device, dtype, bias=False)
    ours, theirs = (errors_of(name, problem) for name in (OURS, "peft_dora"))
    worse = {o: (ours[o], theirs[o]) for o in OUTPUTS if not ours[o] <= ROUNDING * theirs[o]}
    assert not worse, f"(ours, PEFT's): {worse}"
