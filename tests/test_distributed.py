"""Training, checkpoints and adapters over two processes: DDP and FSDP2, over gloo on CPUs and over NCCL on two GPUs."""

import pytest
import torch

from distributed.launcher import Ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def two(request, tmp_path_factory):
    ranks = Ranks(2, request.param, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


TRAINING = {
    "ddp": {"engine": "ddp"},
    "ddp, accumulated, checkpointing": {"engine": "ddp", "accumulate": 2, "checkpointing": True},
    "ddp, bf16 autocast": {"engine": "ddp", "dtype": "bfloat16"},
    "fsdp2": {"engine": "fsdp2"},
    "fsdp2, sgd": {"engine": "fsdp2", "optimizer": "sgd"},
    "fsdp2, kept whole after forward": {"engine": "fsdp2", "reshard": False},
    "fsdp2, accumulated, checkpointing": {"engine": "fsdp2", "accumulate": 2, "checkpointing": True},
    "fsdp2, bf16": {"engine": "fsdp2", "dtype": "bfloat16"},
    "fsdp2, bf16, kept whole after forward": {"engine": "fsdp2", "dtype": "bfloat16", "reshard": False},
}


@pytest.mark.parametrize("model", ["mixed", "llama"])
@pytest.mark.parametrize("case", TRAINING)
def test_training_equals_that_of_one_process(two, case, model):
    if model == "llama":
        pytest.importorskip("transformers")
    results = two.run("train", model=model, **TRAINING[case])
    assert results[0]["layers"] == {"mixed": 8, "llama": 15}[model]
