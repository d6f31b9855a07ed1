"""Tiny transformers models in three flavours of DoRA, and what it takes to run a Trainer on them."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from module_cases import train_a_little
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from dora_ext import inject

RANK, ALPHA = 4, 8
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "t5": ["q", "v", "wo"]}
# PEFT 0.21 cannot wrap T5 as a "SEQ_2_SEQ_LM" of transformers 5: a method that it looks for is gone.
TASKS = {"llama": "CAUSAL_LM", "t5": None}
has_integration = find_spec("dora_ext.integrations.peft") is not None
# "dora_ext": inject, without PEFT. "enabled": a PEFT model on our kernels. "peft": PEFT's own code, to compare with.
OURS = ["dora_ext", *(["enabled"] if has_integration else [])]


def base_model(kind: str = "llama", hidden: int = 64) -> nn.Module:
    """Always the same random weights, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "t5":
            t5 = T5Config(
                vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
            return T5ForConditionalGeneration(t5)
        llama = LlamaConfig(
            vocab_size=32, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, use_cache=False,
            initializer_range=0.1,
        )  # fmt: skip
        return LlamaForCausalLM(llama)


def peft_model(kind: str = "llama", **options) -> nn.Module:
    """PEFT's model with an adapter in mid-training."""
    peft = pytest.importorskip("peft")
    config = {
        "r": RANK, "lora_alpha": ALPHA, "use_dora": True, "lora_dropout": 0.0, "target_modules": TARGETS[kind],
        "task_type": TASKS[kind],
    }  # fmt: skip
    return train_a_little(peft.get_peft_model(base_model(kind), peft.LoraConfig(**(config | options))))


def dora_model(flavour: str, kind: str = "llama") -> nn.Module:
    """The same numbers in every flavour."""
    theirs = peft_model(kind)
    if flavour != "dora_ext":
        return theirs
    ours = inject(base_model(kind), TARGETS[kind], r=RANK, alpha=ALPHA)
    ours.load_state_dict({k.removeprefix("base_model.model."): v for k, v in theirs.state_dict().items()})
    return ours


def kernels_for(flavour: str):
    """A context in which the models of this flavour are made and run."""
    if flavour != "enabled":
        return nullcontext()
    from dora_ext.integrations.peft import enabled

    return enabled()


def sequences(count: int = 8, length: int = 16) -> list[dict]:
    """Counting in steps of one to four: a model that learns lowers its loss at once."""
    generator = torch.Generator().manual_seed(3)
    start, step = (torch.randint(2, high, (count, 1), generator=generator) for high in (32, 6))
    tokens = 2 + (start + (step - 1) * torch.arange(length)) % 30
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def arguments(cls, folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 11,
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = cls(**(defaults | options))
    # Several visible GPUs would otherwise get a DataParallel each.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
