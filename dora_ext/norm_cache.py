"""Reusing a weight norm while nothing changed: gradient accumulation and checkpoint recomputation get it for free.

A cached norm is offered again only if the same three tensors (storage, place in it, version), the same scaling and
stream come back and no optimizer has stepped since. The storages are held weakly: that frees their memory, but keeps
their identity from being given to another (an address and a version repeat; weak references to the tensors themselves
would forbid torch.utils.swap_tensors, which `.to()` uses). Where FSDP2 gathers W into such a storage, the part of W
that this process keeps is a fourth tensor: gathering the same W again costs no norm. What leaves no trace on the host
(`p.data.add_`, an optimizer that writes through raw pointers outside torch.optim) is looked for on the device:
`norm_cached` hashes all of A and B and a sample of every row and column of W, and computes the norm anew if the hash
moved. Nothing waits for it.
"""

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _load
from .distributed import find_shard, shard_of

_optimizer_steps = 0


def _count_step(*_args) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


_STORAGE = 8  # bytes of a storage in what _C.places gives

NO_NORMS = (None, None, 0)  # in a state's place, before arguments that follow it: by name, they take a microsecond


class NormCache:
    """One layer's norm. Keeps no weight alive, is not part of a state_dict, and is empty again after copy or pickle."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the norm: the next forward computes it."""
        self._norm: Tensor | None = None
        self._fingerprint: Tensor | None = None
        self._epoch = 0
        self._storages: tuple[StorageWeakRef, ...] = ()
        self._storages_are = b""
        self._key: tuple = ()
        self._shard = None

    @property
    def computed(self) -> int:
        """How many norms were computed since the cache was made or cleared (reads the device: it waits)."""
        return 0 if self._fingerprint is None else int(self._fingerprint[3])

    def state(self, tensors: tuple[Tensor, ...], constants: tuple, out: int) -> tuple:
        """(cached, fingerprint, epoch) for an op that takes them, norm_cached for one; () if nothing can be kept of
        these tensors, whose first is W, and inside torch.compile or while a CUDA graph is captured: a norm read from
        here would be frozen into it."""
        weight = tensors[0]
        on_cuda = weight.is_cuda
        if torch.compiler.is_compiling() or (on_cuda and torch.cuda.is_current_stream_capturing()):
            return ()
        places = _load.module.places(tensors)
        if places is None:  # tensors of inference mode have no version
            return ()
        # Not torch.cuda.current_stream(), nor weight.device: making such an object costs as much as a launch.
        stream = torch._C._cuda_getCurrentRawStream(weight.get_device()) if on_cuda else 0
        key = (places, constants, stream, _optimizer_steps)
        if key == self._key:  # never with a shard, of which the key has more
            return self._norm, self._fingerprint, self._epoch
        storages = places[: _STORAGE * len(tensors)]
        if storages[:_STORAGE] != self._storages_are[:_STORAGE]:  # another W
            self._shard = find_shard(weight.untyped_storage()._cdata)
        shard = shard_of(self._shard)
        if shard is not None:
            # An operation on the DTensor counts in its own version, one on the local tensor in that one's.
            constants = (*constants, shard._version)
            tensors = (*tensors, shard._local_tensor)
            of_shard = _load.module.places(tensors[-1:])
            storages += of_shard[:_STORAGE]
            key = (places + of_shard, constants, stream, _optimizer_steps)
        if key != self._key:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            fits = self._norm is not None and (self._norm.device, self._norm.dtype) == (weight.device, dtype)
            if fits and len(self._norm) == out and self._key[2] == stream:
                self._epoch += 1  # one launch less than a zeroed fingerprint
            else:
                self._norm = torch.empty(out, dtype=dtype, device=weight.device)
                self._fingerprint = torch.zeros(4, dtype=torch.int64, device=weight.device)
            if storages != self._storages_are:
                self._storages_are = storages
                self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in tensors)
            self._key = key
        return self._norm, self._fingerprint, self._epoch

    def __deepcopy__(self, memo: dict) -> "NormCache":
        return NormCache()

    def __reduce__(self) -> tuple:
        return NormCache, ()


def invalidate_norms(model: nn.Module) -> None:
    """Forget every cached norm in `model`. Needed only after a change that nothing can see: single elements of a base
    weight written through `.data` or a raw pointer, outside any torch.optim step, or by one process alone into its part
    of a weight that FSDP2 shares out (call it on every process then)."""
    for module in model.modules():
        cache = getattr(module, "norm_cache", None)
        if isinstance(cache, NormCache):
            cache.clear()
