"""What the ranks do together. Each compares with a plain model that computes the global batch alone; all ranks compute
that one, and any rank may fail. Devices and sizes come from the test: gloo and NCCL run the same lines."""

import copy
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from types import MethodType

import torch
from torch import Tensor, nn

from dora_ext import reference
from dora_ext.distributed import whole
from dora_ext.injection import dora_layers
from dora_ext.ops import norm_and_gain
from dora_ext.testing import assert_close, doubles, relative_error

from .launcher import Rank
from .models import BATCH, LENGTH, VOCAB, make_model, spread, trained, without_sync


def make_batch(step: int, part: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=generator).to(device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def check_norms(model: nn.Module) -> None:
    """From here on every norm that a forward uses, kept or new, is compared with one of the tensors that it is for."""

    def checked(layer, *tensors):
        norm, gain = type(layer)._norm_and_gain(layer, *tensors)
        assert not any(hasattr(t, "full_tensor") for t in tensors), "a DTensor inside forward"
        ref = doubles(dict(zip(("weight", "lora_A", "lora_B", "magnitude"), tensors, strict=True)))
        m = ref.pop("magnitude")
        expected = reference_norm(layer, **ref)
        # Adapters wider than W are rounded to W's dtype where they are multiplied.
        tolerance = 1e-5 if tensors[0].dtype == tensors[1].dtype else 3e-3
        assert_close(norm, expected, tolerance, "norm")
        assert_close(gain, m.flatten() / expected, tolerance, "gain")
        fresh, _ = norm_and_gain(*tensors, scaling=layer.scaling, transposed=layer.transposed)
        assert_close(norm, fresh, 1e-6, "kept norm")
        return norm, gain

    for layer in dora_layers(model).values():
        layer._norm_and_gain = MethodType(checked, layer)


def reference_norm(layer: nn.Module, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    if weight.dim() > 2:
        weight, lora_A, lora_B = weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1)
    return reference.weight_norm(weight, lora_A, lora_B, layer.scaling, layer.transposed)


def norms_computed(model: nn.Module) -> list[int]:
    """By each layer that keeps its norm; one over a quantised weight may not."""
    counts = [module.norm_cache.computed for module in model.modules() if hasattr(module, "norm_cache")]
    return [count for count in counts if count]


class Trainer:
    """One model's training: `step` gives the mean loss of the global batch and every gradient, whole, and steps."""

    def __init__(self, model: nn.Module, rank: Rank, optimizer: str = "adamw", autocast: bool = False) -> None:
        self.model, self.rank, self.autocast = model, rank, autocast
        parameters = trained(model).values()
        if optimizer == "adamw":
            # A larger eps than usual: with 1e-8 the rounding errors of gradients near 0 would become steps.
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def step(self, step: int, parts: Iterable[Tensor], spread_over: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        parts, total = list(parts), 0.0
        self.optimizer.zero_grad()
        for i, ids in enumerate(parts):
            autocast = torch.autocast(self.rank.device.type, torch.bfloat16) if self.autocast else nullcontext()
            with without_sync(self.model, last=i == len(parts) - 1):
                with autocast:
                    loss = loss_of(self.model, ids) / len(parts)
                loss.backward()
            total = total + loss.detach()
        if spread_over > 1:
            torch.distributed.all_reduce(total)
            total = total / spread_over
        gradients = {name: whole(p.grad).clone() for name, p in trained(self.model).items()}
        self.optimizer.step()
        return total, gradients


class HalfTrainer(Trainer):
    """What FSDP2's mixed precision does, by one process: parameters in float32, a copy in bfloat16 computes."""

    def __init__(self, model: nn.Module, rank: Rank, **options) -> None:
        super().__init__(model, rank, **options)
        self.half = copy.deepcopy(model).to(torch.bfloat16)

    def step(self, step: int, parts: Iterable[Tensor], spread_over: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        parts, total = list(parts), 0.0
        full, half = trained(self.model), trained(self.half)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, p in half.items():
                p.copy_(full[name])
        for ids in parts:
            self.half.zero_grad()
            loss = loss_of(self.half, ids) / len(parts)
            loss.backward()
            total = total + loss.detach()
            for name, p in full.items():
                gradient = half[name].grad.to(p.dtype)
                p.grad = gradient if p.grad is None else p.grad + gradient
        gradients = {name: p.grad.clone() for name, p in full.items()}
        self.optimizer.step()
        return total, gradients


def train(
    rank: Rank, model: str, engine: str, reshard: bool = True, dtype: str = "float32", accumulate: int = 1,
    checkpointing: bool = False, nf4: str | None = None, steps: int = 4, optimizer: str = "adamw",
    base: str = "float32", library: str = "dora_ext",
) -> dict:  # fmt: skip
    """Training spread over the ranks equals training alone, by dora_ext: losses of all steps, gradients of the first
    four. Norms are never stale, and computed once for each optimizer step."""
    half = dtype == "bfloat16"
    options = {"device": rank.device, "checkpointing": checkpointing, "nf4": nf4, "base": base}
    mixed = half and engine == "fsdp2" and base == "float32"
    training = {"rank": rank, "optimizer": optimizer, "autocast": half and not mixed}
    # `other` takes the same sums in another order: bfloat16 cannot be expected to agree better than these two.
    alone, other = ((HalfTrainer if mixed else Trainer)(make_model(model, **options), **training) for _ in range(2))
    with ExitStack() as stack:
        if library == "peft":
            from dora_ext.integrations.peft import enabled

            stack.enter_context(enabled())
        several = spread(make_model(model, library=library, **options), engine, rank.device, reshard, half=mixed)
        check_norms(several)
        ours = Trainer(several, **training)
        return compare(rank, ours, alone, other if half else None, accumulate, steps)


def compare(rank: Rank, ours: Trainer, alone: Trainer, other: Trainer | None, accumulate: int, steps: int) -> dict:
    worst = 0.0
    for step in range(steps):
        batches = [make_batch(step, part, rank.device) for part in range(accumulate)]
        mine = [batch.chunk(rank.world)[rank.rank] for batch in batches]
        loss, gradients = ours.step(step, mine, rank.world)
        expected_loss, expected = alone.step(step, batches)
        bound = loss_bound = 1e-5
        if other is not None:
            other_loss, spread_of = other.step(step, [half for b in batches for half in b.flip(0).chunk(rank.world)])
            bound = 2 * max(relative_error(spread_of[name], expected[name]) for name in expected)
            loss_bound = max(2 * relative_error(other_loss, expected_loss), 1e-3)
        assert gradients.keys() == expected.keys()
        assert_close(loss, expected_loss, loss_bound, f"loss of step {step}")
        for name, gradient in gradients.items():
            assert expected[name].norm() > 0, f"{name}: nothing to compare"
            assert gradient.dtype == torch.float32, f"{name}: {gradient.dtype}"
            worst = max(worst, relative_error(gradient, expected[name]))
            if step < 4:
                assert_close(gradient, expected[name], bound, f"gradient of {name} in step {step}")
        counts = norms_computed(ours.model)
        assert counts == [step + 1] * len(counts), f"norms computed in {step + 1} steps: {counts}"
    return {"worst gradient": worst, "bound": bound, "layers": len(counts), "loss": loss.item()}
