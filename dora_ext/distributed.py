"""What changes when the parameters of a model are spread over several processes.

DistributedDataParallel leaves them whole. FSDP2 (`fully_shard`) keeps each as a DTensor, of which a process holds a
part, and puts a plain tensor in its place while the module around it runs. DeepSpeed's ZeRO-3 leaves an empty tensor
with a `ds_id` in its place, and fills it while the module runs.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gathered(of: nn.Module | Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Inside, parameters that DeepSpeed's ZeRO-3 has partitioned are whole. With `write`, what process 0 has written
    into them is everyone's afterwards. Every process must come here."""
    partitioned = [p for p in (of.parameters() if isinstance(of, nn.Module) else of) if is_partitioned(p)]
    if not write:
        # DeepSpeed refuses to gather again what is whole already.
        partitioned = [p for p in partitioned if p.numel() != p.ds_numel]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def is_partitioned(t: Tensor) -> bool:
    return hasattr(t, "ds_id")


def hold_past_hooks(tensors: Iterable[Tensor | None]) -> bool:
    """Hooks on saved tensors are at work (activation checkpointing), and these need not go through them: all are a
    module's own parameters, which backward finds as forward left them. No copy made for one call is, no replacement by
    torch.func.functional_call, and nothing that ZeRO-3 empties in between. Not for torch.compile."""
    if torch.compiler.is_compiling() or _top_hooks(True) is None:
        return False
    return all(t is None or (isinstance(t, nn.Parameter) and not is_partitioned(t)) for t in tensors)


# torch has no public question for hooks on saved tensors; without an answer, they are at work.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _ignore_tracing: True)


def is_sharded(t: Tensor) -> bool:
    """A DTensor, as FSDP2 leaves it between forwards."""
    # A failed look-up costs as much as a small launch, and this is asked for several tensors in every forward.
    return type(t) not in (nn.Parameter, Tensor) and hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a DTensor, which FSDP2 leaves on each rank in part; any other tensor as it is. Every rank must call it."""
    # With CPUOffloadPolicy the part is on the host, where NCCL cannot collect it.
    return t.to(t.device_mesh.device_type).full_tensor() if is_sharded(t) else t


def whole_shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.ds_shape) if is_partitioned(t) else tuple(t.shape)


def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """parameter.copy_(value) for a `value` that is whole on every process; a DTensor takes its part of it."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        # Without a source rank nothing is sent: each one has the value.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def shared_among_processes(model: nn.Module) -> bool:
    """Parts of the model's parameters are elsewhere, so that saving takes all processes."""
    return any(is_sharded(p) or is_partitioned(p) for p in model.parameters())


def is_first() -> bool:
    """Process 0, or the only one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def on_first(action: Callable[[], None]) -> None:
    """Process 0 runs `action` and the others wait until it is done; if it fails, all of them raise."""
    errors: list[Exception | None] = [None]
    if is_first():
        try:
            action()
        except Exception as error:
            errors = [error]
    mine = errors[0]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise mine or errors[0]


def find_shard(storage: int) -> "weakref.ref[Any] | None":
    """FSDP2's own record of the parameter that it unshards into this storage (its `_cdata`), if there is one.

    FSDP2 writes into the unsharded tensor past its version counter, so that a change of the sharded parameter can be
    told from its record alone. All records are looked through: call it once for a storage.
    """
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for state in [reference() for reference in states.values()]:
        # Until torch 2.12 a module had one group of parameters.
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups for p in getattr(group, "fsdp_params", ())):
            unsharded = getattr(parameter, "_unsharded_param", None)
            if type(unsharded) is nn.Parameter and unsharded.untyped_storage()._cdata == storage:
                return weakref.ref(parameter)
    return None


def shard_of(record: "weakref.ref[Any] | None") -> Tensor | None:
    """The DTensor of a record that `find_shard` gave."""
    return getattr(record and record(), "sharded_param", None)
