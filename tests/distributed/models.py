"""Small models to spread over processes, and how each engine takes them. Sizes are odd, so that shards are uneven."""

import re
from contextlib import nullcontext
from functools import partial

import torch
from module_cases import train_a_little
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from dora_ext import inject

VOCAB, LENGTH, BATCH = 31, 7, 4
TARGETS = r"(embed|head|.*\.(up|down|mix|embed_tokens|\w+_proj))"  # all but Llama's head


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim + 1), nn.Linear(2 * dim + 1, dim, bias=False)
        self.mix = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.silu(self.up(x)))
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Mixed(nn.Module):
    """An embedding, linear layers and convolutions; ids (batch, length) -> logits (batch, length, VOCAB)."""

    checkpointing = False

    def __init__(self, dim: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


class Llama(nn.Module):
    """A Llama of transformers, as `Mixed` is called."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=20, intermediate_size=35, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=LENGTH, attn_implementation="eager", use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def checkpointing(self) -> bool:
        return self.model.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        assert on
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def make_base(name: str, device: torch.device) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(1)
    return {"mixed": Mixed, "llama": Llama}[name]().to(device)


def make_model(
    name: str, device: torch.device, checkpointing: bool = False, nf4: str | None = None, base: str = "float32",
    library: str = "dora_ext",
) -> nn.Module:  # fmt: skip
    """All of its linear layers (but Llama's head), embeddings and convolutions are DoRA layers in mid-training."""
    model = make_base(name, device).to(getattr(torch, base))
    if nf4:
        quantise(model, nf4, device)
    if checkpointing:
        model.checkpointing = True
    if library == "dora_ext":
        return train_a_little(inject(model, TARGETS, r=3, alpha=6))
    from peft import LoraConfig, get_peft_model

    model.is_loaded_in_4bit = nf4 is not None  # PEFT looks at it
    return train_a_little(get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True)))


def quantise(model: nn.Module, storage: str, device: torch.device) -> None:
    """The blocks' linear layers become bitsandbytes' Linear4bit over NF4, packed in the dtype `storage`."""
    import bitsandbytes

    storage_dtype = getattr(torch, storage)
    for path, linear in list(model.blocks.named_modules()):
        if type(linear) is nn.Linear:
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.float32,
                quant_type="nf4", quant_storage=storage_dtype,
            )  # fmt: skip
            packed.weight = bitsandbytes.nn.Params4bit(
                linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", quant_storage=storage_dtype,
                module=packed,
            )  # fmt: skip
            packed.bias = linear.bias
            parent, _, child = path.rpartition(".")
            setattr(model.blocks.get_submodule(parent), child, packed.to(device))


def spread(model: nn.Module, engine: str, device: torch.device, reshard: bool = True, half: bool = False) -> nn.Module:
    """`model` under "ddp" or "fsdp2"; with `half`, FSDP2 computes in bfloat16 and sums gradients in float32."""
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    shard = partial(fully_shard, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    for block in getattr(model, "base_model", model).blocks:  # PEFT's model looks for them in what is inside it
        shard(block)
    return shard(model)


def without_sync(model: nn.Module, last: bool):
    """The context of one of several accumulated batches: gradients meet only after the last one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        re.sub(r"^(module\.)?(base_model\.model\.)?", "", name): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
