"""Training, checkpoints and adapters over two processes: DDP and FSDP2, over gloo on CPUs and over NCCL on two GPUs."""

import signal

import pytest
import torch
from distributed import states
from distributed.launcher import Rank, Ranks
from distributed.models import make_base

from dora_ext import load_adapter
from dora_ext.testing import assert_close


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
    "fsdp2, bf16 base, bf16 autocast": {"engine": "fsdp2", "dtype": "bfloat16", "base": "bfloat16"},
}


@pytest.mark.parametrize("model", ["mixed", "llama"])
@pytest.mark.parametrize("case", TRAINING)
def test_training_equals_that_of_one_process(two, case, model):
    if model == "llama":
        pytest.importorskip("transformers")
    # Gloo's time is better spent on other cases.
    steps = 20 if two.device == "cuda" else 4
    results = two.run("training.train", model=model, steps=steps, **TRAINING[case])
    assert results[0]["layers"] == {"mixed": 8, "llama": 15}[model]


PEFT = {
    "ddp": {"engine": "ddp"},
    "ddp, nf4": {"engine": "ddp", "nf4": "uint8"},
    "fsdp2, accumulated": {"engine": "fsdp2", "accumulate": 2},
    "fsdp2, bf16": {"engine": "fsdp2", "dtype": "bfloat16"},
    "fsdp2, nf4": {"engine": "fsdp2", "nf4": "bfloat16"},
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_models_with_enable(two, case):
    pytest.importorskip("peft")
    if "nf4" in case:
        pytest.importorskip("bitsandbytes")
    results = two.run("training.train", model="mixed", library="peft", **PEFT[case])
    assert results[0]["layers"] == 8  # all are one call, and keep their norm


NF4 = {
    "ddp": {"engine": "ddp", "nf4": "uint8"},
    "ddp, bf16 autocast": {"engine": "ddp", "nf4": "uint8", "dtype": "bfloat16"},
    "fsdp2": {"engine": "fsdp2", "nf4": "uint8"},
    "fsdp2, packed as bf16": {"engine": "fsdp2", "nf4": "bfloat16"},
    "fsdp2, bf16, packed as bf16": {"engine": "fsdp2", "nf4": "bfloat16", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", NF4)
def test_nf4_bases(two, case):
    pytest.importorskip("bitsandbytes")
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if NF4[case] == {"engine": "fsdp2", "nf4": "uint8"} and release < (2, 13):
        pytest.skip("FSDP2 of this torch shards no parameters of integers")
    two.run("training.train", model="mixed", **NF4[case])


@pytest.mark.parametrize("saved_by", ["ddp", "fsdp2", None])
@pytest.mark.parametrize("resumed_by", ["ddp", "fsdp2", None])
def test_sharded_checkpoints(two, tmp_path, saved_by, resumed_by):
    """Saved on two ranks, loaded on one, and the other way round: training goes on as if nothing had happened."""

    def run(scenario, engine):
        if engine is None:
            device = torch.device(two.device, 0) if two.device == "cuda" else torch.device(two.device)
            return getattr(states, scenario)(Rank(0, 1, device), tmp_path, None)
        return two.run(f"states.{scenario}", folder=tmp_path, engine=engine)[0]

    went_on = run("save_checkpoint", saved_by)
    assert run("resume_checkpoint", resumed_by) == pytest.approx(went_on, rel=1e-5)


def test_full_checkpoints(two):
    two.run("states.full_checkpoint")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", ["mixed", "llama"])
def test_adapter_files(two, tmp_path, engine, model):
    """Saved by two processes; loaded by one, by PEFT, and by two that have sharded the model already."""
    peft = pytest.importorskip("peft")
    if model == "llama":
        pytest.importorskip("transformers")
    device = torch.device(two.device, 0) if two.device == "cuda" else torch.device(two.device)
    expected = torch.tensor(two.run("states.save", folder=tmp_path, engine=engine, model=model)[0])

    plain = load_adapter(make_base(model, device), tmp_path)
    assert_close(states.logits(plain, device), expected, 1e-5)
    theirs = peft.PeftModel.from_pretrained(make_base(model, device), tmp_path)
    assert_close(states.logits(theirs.base_model, device), expected, 1e-5)
    for result in two.run("states.load", folder=tmp_path, model=model):
        assert_close(torch.tensor(result), expected, 1e-5)


@pytest.mark.parametrize("reshard", [True, False])
def test_norms_of_sharded_parameters(two, reshard):
    two.run("states.changes", reshard=reshard)


@pytest.mark.parametrize("scenario", ["between_forwards", "from_meta", "mistakes"])
def test_sharded_parameters(two, scenario):
    two.run(f"states.{scenario}")


@pytest.mark.timeout(150)  # shows where it hangs, if it does
@pytest.mark.parametrize("during", ["backward", "save"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_a_killed_rank_ends_the_others(tmp_path, device, engine, during):
    """... inside the process group's timeout, and the last saved adapter is whole."""
    if (engine, during) == ("ddp", "save"):
        pytest.skip("rank 0 of DDP saves alone: no other waits for it")
    ranks = Ranks(2, device, tmp_path, timeout=10)
    try:
        answers = ranks.answers("faults.killed", folder=tmp_path / "adapter", engine=engine, during=during)
    finally:
        ranks.stop()
    victim = 1 if during == "backward" else 0
    assert answers[victim] == ("died", -signal.SIGKILL)
    kind, text = answers[1 - victim]
    # NCCL's watchdog ends the process itself.
    assert kind == "raised" or (device == "cuda" and kind == "died" and text != 0), text

    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    trainer = states.start(Rank(0, 1, where), None)
    states.some_steps(trainer, 0, 1)
    saved = load_adapter(make_base("mixed", where), tmp_path / "adapter")
    assert_close(states.logits(saved, where), states.logits(trainer.model, where), 1e-5)
