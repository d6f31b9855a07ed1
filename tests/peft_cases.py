"""What the tests of the PEFT integration share: models, and the comparison of PEFT's code with ours."""

from collections import OrderedDict

import pytest
import torch
from module_cases import assert_same, run, train_a_little
from torch import nn

import dora_ext.integrations.peft as integration
from dora_ext.integrations.peft import forwards

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 2, 2, 19, 0], [3, 3, 7, 8, 11, 4]])
TARGETS = ["embed", "first", "second", "conv"]


class Model(nn.Module):
    """Every kind of layer that an adapter sits on, one after the other."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.second(torch.relu(self.first(x)))
        return self.head(x + self.conv(x.movedim(-1, 1)).movedim(1, -1))


def make_model(adapters=("default",), base: nn.Module | None = None, **options):
    torch.manual_seed(5)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": TARGETS, "init_lora_weights": False, **options}
    )
    model = peft.get_peft_model(base or Model(), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    return train_a_little(model)


def activate(model: nn.Module, *adapters: str) -> None:
    model.base_model.set_adapter(list(adapters))
    for name, p in model.named_parameters():  # PEFT before 0.20 leaves magnitudes of inactive adapters trainable
        if "lora_" in name:
            p.requires_grad_(not set(name.split(".")).isdisjoint(adapters))


def both(model: nn.Module, x=IDS, tolerance: float = 1e-5, fused: bool = True) -> None:
    """Output and all gradients of `model` with PEFT's code and with ours."""
    expected = run(model, x)
    expected = {name: t.clone() for name, t in expected.items()}
    with integration.enabled():
        before = forwards.calls["fused"]
        assert_same(run(model, x), expected, tolerance)
        assert (forwards.calls["fused"] > before) == fused


def language_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=16, **small,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


def quantised_layer(kind: str, dtype, dropout: float, bias: bool = True, device: str = "cpu") -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    if kind == "4 bits":
        base = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, quant_type="nf4", compute_dtype=dtype)
    else:
        base = bitsandbytes.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False, threshold=6.0)
    base.load_state_dict(nn.Linear(64, 32, bias=bias).to(dtype).state_dict())
    model = nn.Sequential(OrderedDict(layer=base.to(device)))
    setattr(model, "is_loaded_in_4bit" if kind == "4 bits" else "is_loaded_in_8bit", True)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["layer"])
    return train_a_little(peft.get_peft_model(model, config).base_model.model.layer)
