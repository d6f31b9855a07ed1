"""Scenarios under DeepSpeed's ZeRO-3, which leaves empty tensors in the place of parameters that no module is using."""

import copy
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from dora_ext import inject, load_adapter, save_adapter
from dora_ext.injection import dora_layers
from dora_ext.testing import assert_close

from .launcher import Rank
from .models import TARGETS, make_base, make_model, trained
from .states import logits
from .training import Trainer, check_norms, loss_of, make_batch

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def start(model: nn.Module, rank: Rank):
    import deepspeed

    without_compiling()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG, dist_init_required=False)[0]


def without_compiling() -> None:
    """A faster all_reduce on one machine's CPUs is compiled for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def full_gradient(p: nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(p)


def train(rank: Rank, model: str, library: str = "dora_ext", checkpointing: bool = False, steps: int = 3) -> None:
    """Losses, gradients and norms equal those of a plain model, while the weights are in parts."""
    alone = Trainer(make_model(model, rank.device), rank)
    with ExitStack() as stack:
        if library == "peft":
            from dora_ext.integrations.peft import enabled

            stack.enter_context(enabled())
        engine = start(make_model(model, rank.device, checkpointing, library=library), rank)
        check_norms(engine.module)
        compare(rank, engine, alone, steps)
    for ours, plain in zip(*(dora_layers(m).values() for m in (engine.module, alone.model)), strict=library != "peft"):
        assert ours.base_layer.weight.numel() == 0, "not partitioned: this tests nothing"
        assert_close(ours.weight_norm(), plain.weight_norm(), 1e-5)


def compare(rank: Rank, engine, alone: Trainer, steps: int) -> None:
    for step in range(steps):
        batch = make_batch(step, 0, rank.device)
        loss = loss_of(engine, batch.chunk(rank.world)[rank.rank])
        engine.backward(loss)
        expected_loss, expected = alone.step(step, [batch])
        torch.distributed.all_reduce(loss.detach())
        assert_close(loss.detach() / rank.world, expected_loss, 1e-5, f"loss of step {step}")
        for name, p in trained(engine.module).items():
            assert_close(full_gradient(p), expected[name], 1e-5, f"gradient of {name} in step {step}")
        engine.step()


def partitioned_from_the_start(rank: Rank, folder: Path) -> list:
    """Layers wrapped around weights that are in parts already: m is the norm of all of W, so that the result is the
    base model's. Then an adapter is loaded, trained for a step, saved; gives the logits of what was saved."""
    import deepspeed

    without_compiling()
    plain = make_base("mixed", rank.device)
    model = make_base("mixed", rank.device)
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert model.head.weight.numel() == 0
    inject(model, TARGETS, r=3, alpha=6)
    for name, layer in dora_layers(model).items():
        norm = inject(copy.deepcopy(plain), [name], r=3).get_submodule(name).weight_norm()
        assert_close(layer.magnitude.flatten(), norm, 1e-6, name)
    if rank.rank == 0:
        save_adapter(make_model("mixed", rank.device), folder / "trained")
    torch.distributed.barrier()
    load_adapter(model, folder / "trained")

    engine = start(model, rank)
    check_norms(engine.module)
    assert_close(logits(engine, rank.device), logits(make_model("mixed", rank.device), rank.device), 1e-5)
    engine.train()
    engine.backward(loss_of(engine, make_batch(0, 0, rank.device)))
    engine.step()
    save_adapter(engine, folder / "saved")
    saved = logits(engine, rank.device)
    for layer in dora_layers(engine.module).values():
        layer.merge()
    assert_close(logits(engine, rank.device), saved, 1e-5)
    for layer in dora_layers(engine.module).values():
        layer.unmerge()
        layer.reset_parameters()
    assert_close(logits(engine, rank.device), logits(plain, rank.device), 1e-5)
    return saved.tolist()
