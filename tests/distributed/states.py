"""Scenarios about parameters that FSDP2 keeps in parts: how they change, are saved and come back."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import dora_ext
from dora_ext import adapter, inject, load_adapter, save_adapter
from dora_ext.distributed import whole
from dora_ext.injection import dora_layers
from dora_ext.testing import assert_close

from .launcher import Rank
from .models import TARGETS, make_base, make_model, spread
from .training import Trainer, check_norms, loss_of, make_batch

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def start(rank: Rank, engine: str | None, model: str = "mixed") -> Trainer:
    """A model under `engine`, or plain where there is one process alone."""
    plain = make_model(model, rank.device)
    return Trainer(spread(plain, engine, rank.device) if engine else plain, rank)


def some_steps(trainer: Trainer, first: int, count: int = 2) -> list[float]:
    rank = trainer.rank
    batches = [make_batch(step, 0, rank.device).chunk(rank.world)[rank.rank] for step in range(first, first + count)]
    return [trainer.step(first + i, [ids], rank.world)[0].item() for i, ids in enumerate(batches)]


def logits(model: nn.Module, device: torch.device) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(make_batch(9, 0, device))


def save_checkpoint(rank: Rank, folder: Path, engine: str | None) -> list[float]:
    """Two steps, a sharded checkpoint with the optimizer's state, and the losses of the next two."""
    trainer = start(rank, engine)
    some_steps(trainer, 0)
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=rank.world == 1)
    return some_steps(trainer, 2)


def resume_checkpoint(rank: Rank, folder: Path, engine: str | None) -> list[float]:
    trainer = start(rank, engine)
    some_steps(trainer, 7, 1)  # other weights, and norms that must not outlive them
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder, no_dist=rank.world == 1)
    set_state_dict(
        trainer.model, trainer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return some_steps(trainer, 2)


def full_checkpoint(rank: Rank) -> None:
    """A full state dict from FSDP2 has a plain model's keys and loads there, and the other way round."""
    trainer = start(rank, "fsdp2")
    some_steps(trainer, 0)
    full = get_model_state_dict(trainer.model, options=FULL)
    expected = logits(trainer.model, rank.device)
    if rank.rank == 0:
        plain = make_model("mixed", rank.device)
        assert full.keys() == plain.state_dict().keys()
        plain.load_state_dict(full)
        assert_close(logits(plain, rank.device), expected, 1e-5)
    other = start(rank, "fsdp2").model
    logits(other, rank.device)  # norms of the old weights
    check_norms(other)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, full, options=options)
    assert_close(logits(other, rank.device), expected, 1e-5)


def save(rank: Rank, folder: Path, engine: str, model: str) -> list:
    """Trains and saves: only rank 0 writes, all wait for it. Gives the logits of the trained model."""
    trainer = start(rank, engine, model)
    some_steps(trainer, 0)
    with pytest.MonkeyPatch.context() as patch:
        if rank.rank:
            patch.setattr(adapter, "replace_files", lambda *_: pytest.fail("rank 1 writes"))
        save_adapter(trainer.model, folder)
    if engine == "fsdp2":
        assert (folder / adapter.WEIGHTS_NAME).exists()
        (folder / "file").touch()
        torch.distributed.barrier()
        with pytest.raises(OSError, match="file"):  # on every rank
            save_adapter(trainer.model, folder / "file")
    return logits(trainer.model, rank.device).tolist()


def load(rank: Rank, folder: Path, model: str) -> list:
    """An adapter file into a model that is sharded already and has computed norms."""
    sharded = start(rank, "fsdp2", model).model
    logits(sharded, rank.device)
    check_norms(sharded)
    assert load_adapter(sharded, folder) is sharded
    return logits(sharded, rank.device).tolist()


def changes(rank: Rank, reshard: bool) -> None:
    """Each way of changing a sharded parameter is seen by the next forward; nothing else is computed again.

    W is changed in its first row's last but one column, which is not in the fingerprint's sample.
    """
    trainer = start(rank, None)
    model = trainer.model = spread(trainer.model, "fsdp2", rank.device, reshard)
    trainer.optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    check_norms(model)
    layer, ids = model.blocks[0].down, make_batch(0, 0, rank.device)
    weight, lora_A, lora_B = layer.base_layer.weight, *layer._factors()
    generator = torch.Generator().manual_seed(5)

    def computed() -> list[int]:
        loss_of(model, ids).backward()
        return [module.norm_cache.computed for module in dora_layers(model).values()]

    def one_element() -> None:
        delta = torch.zeros(weight.shape, device=rank.device)
        delta[0, -2] = 1.0
        weight.add_(distribute_tensor(delta, weight.device_mesh, weight.placements))

    def state_dict() -> None:
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        full["blocks.0.down.base_layer.weight"][0, -2] += 1.0
        set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))

    def on_one_rank(t: DTensor) -> None:
        if rank.rank == rank.world - 1:
            t.to_local()[0, 0] += 1.0

    def noise() -> None:
        value = torch.randn(weight.shape, generator=generator).to(rank.device)
        weight.copy_(distribute_tensor(value, weight.device_mesh, weight.placements))

    def raw_write() -> None:
        weight.to_local().data[0, -2] += 1.0
        trainer.optimizer.step()

    before = computed()
    assert before == computed() == [1] * len(before), "gathered again, nothing changed"
    here = list(dora_layers(model).values()).index(layer)
    for name, change, everywhere in (
        ("one element of W", one_element, False),
        ("all of W", noise, False),
        ("A through data", lambda: lora_A.to_local().data.add_(0.1), False),
        ("B, on one rank", lambda: on_one_rank(lora_B), False),
        ("a state dict", state_dict, True),
        ("an optimizer with raw writes", raw_write, True),
    ):
        with torch.no_grad():
            change()
        after = computed()
        expected = [n + (everywhere or i == here) for i, n in enumerate(before)]
        assert after == expected, f"{name}: norms computed {after}, expected {expected}"
        before = after
    with torch.no_grad():
        on_one_rank(weight)
    dora_ext.invalidate_norms(layer)
    assert computed()[here] == 1


def between_forwards(rank: Rank) -> None:
    """What is asked of a layer while its parameters are DTensors is answered as by a plain one."""
    expected = make_model("mixed", rank.device)
    model = spread(make_model("mixed", rank.device), "fsdp2", rank.device)
    ids = make_batch(0, 0, rank.device)
    loss_of(model, ids).backward()
    for (name, ours), plain in zip(dora_layers(model).items(), dora_layers(expected).values(), strict=True):
        assert isinstance(ours.magnitude, DTensor) and isinstance(ours.base_layer.weight, DTensor)
        assert_close(ours.weight_norm(), plain.weight_norm(), 1e-6, name)
        assert_close(ours.to_base().weight, plain.to_base().weight, 1e-6, name)
        ours.merge()
        plain.merge()
        assert_close(ours.merged_weight, plain.merged_weight, 1e-6, name)
    merged = logits(model, rank.device)
    assert_close(merged, logits(expected, rank.device), 1e-5)
    for layer in dora_layers(model).values():
        layer.unmerge()
    assert_close(logits(model, rank.device), merged, 1e-5)

    for layer in dora_layers(model).values():
        layer.reset_parameters()
        assert_close(whole(layer.magnitude).flatten(), layer.weight_norm(), 1e-6)
    check_norms(model)
    assert_close(logits(model, rank.device), logits(make_base("mixed", rank.device), rank.device), 1e-5)


def from_meta(rank: Rank) -> None:
    """A model too large for one process: made on meta, sharded, and only then given its weights."""
    expected = make_model("mixed", rank.device)
    with torch.device("meta"):
        model = inject(make_base("mixed", torch.device("meta")), TARGETS, r=3, alpha=6)
    spread(model, "fsdp2", rank.device).to_empty(device=rank.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, expected.state_dict() if rank.rank == 0 else {}, options=options)
    check_norms(model)
    assert_close(logits(model, rank.device), logits(expected, rank.device), 1e-5)


def mistakes(rank: Rank) -> None:
    """Sharded in the wrong place or order: an error that says so."""
    mesh = init_device_mesh(rank.device.type, (rank.world,))
    model = make_model("mixed", rank.device)
    fully_shard(model.blocks[0].up.base_layer, mesh=mesh)
    with pytest.raises(RuntimeError, match="fully_shard on it or on a module around it"):
        logits(model, rank.device)
    model = spread(make_base("mixed", rank.device), "fsdp2", rank.device)
    with pytest.raises(ValueError, match="before fully_shard"):
        inject(model, TARGETS, r=3)
