"""The same training run through PEFT's DoRA and through ours has the same losses."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import dora_ext.integrations.peft as dora  # noqa: E402

STEPS, BATCH, LENGTH = 200, 4, 48
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def text_batches() -> torch.Tensor:
    """Python's own documentation, byte by byte: (STEPS, BATCH, LENGTH)."""
    from pydoc_data.topics import topics

    data = "".join(topics[name] for name in sorted(topics)).encode()
    starts = torch.randint(len(data) - LENGTH, (STEPS, BATCH, 1), generator=torch.Generator().manual_seed(1))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[starts + torch.arange(LENGTH)]


def losses(base: torch.nn.Module, batches: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-3
    )  # higher rates let bf16 runs drift apart whoever computes them
    results = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss.item())
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_pefts(device, dtype):
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        initializer_range=0.1,
    )
    base, batches = transformers.LlamaForCausalLM(config).to(device, dtype), text_batches().to(device)
    theirs = losses(base, batches)
    with dora.enabled():
        ours = losses(base, batches)
    assert theirs[-20:].mean() < 0.9 * theirs[0]  # it learns
    difference = ((ours - theirs).abs() / theirs).mean()
    print(f"{dtype}: {theirs[0]:.3f} -> {theirs[-20:].mean():.3f}, mean relative difference {difference:.2e}")
    assert difference < 1e-3
