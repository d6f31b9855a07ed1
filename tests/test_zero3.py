"""DeepSpeed's ZeRO-3 over two processes: the real thing where it is installed."""

import importlib.util
import os

import pytest
import torch
from distributed.launcher import Ranks
from distributed.models import make_base
from distributed.states import logits

from dora_ext import load_adapter
from dora_ext.testing import assert_close

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also where it was installed beside a GPU
    ranks = Ranks(2, "cpu", tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


CASES = {
    "mixed": {"model": "mixed"},
    "llama": {"model": "llama"},
    "checkpointing": {"model": "mixed", "checkpointing": True},
    "peft": {"model": "mixed", "library": "peft"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_one_process(two, case):
    if case in ("llama", "peft"):
        pytest.importorskip({"llama": "transformers"}.get(case, case))
    two.run("zero.train", **CASES[case])


def test_weights_that_are_partitioned_when_they_are_wrapped(two, tmp_path):
    expected = torch.tensor(two.run("zero.partitioned_from_the_start", folder=tmp_path)[0])
    saved = load_adapter(make_base("mixed", torch.device("cpu")), tmp_path / "saved")
    assert_close(logits(saved, torch.device("cpu")), expected, 1e-5)
