"""Norms under enable(): computed once while nothing changed, never stale, and keeping nothing alive."""

import copy
import gc
import weakref

import pytest
import torch
from module_cases import make_base, make_input, peft_layer
from peft_cases import IDS
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import dora_ext
import dora_ext.integrations.peft as integration
from dora_ext.testing import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def on():
    with integration.enabled():
        yield


def computed(model: nn.Module) -> list[int]:
    caches = (m.norm_cache for m in model.modules() if hasattr(m, "norm_cache"))
    return [cache.computed for cache in caches]


class Net(nn.Module):
    def __init__(self, checkpointing):
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 12), nn.Conv1d(12, 12, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.checkpointing = checkpointing

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing is None:
                x = x + torch.tanh(block(x))
            else:
                x = torch.utils.checkpoint.checkpoint(
                    lambda x, b=block: x + torch.tanh(b(x)), x, use_reentrant=self.checkpointing
                )
        return self.conv(x.movedim(-1, 1))


@pytest.mark.parametrize("made_before", [True, False])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no checkpoints", "non-reentrant", "reentrant"])
def test_one_norm_for_each_layer_and_optimizer_step(checkpointing, made_before):
    """Gradient accumulation over 8 batches, with recomputation, and with evaluation in between."""
    config = peft.LoraConfig(
        r=4, use_dora=True, target_modules=["embed", "blocks.0", "blocks.1", "blocks.2", "conv"],
        init_lora_weights=False, lora_dropout=0.1,
    )  # fmt: skip
    if made_before:
        integration.disable()
    model = peft.get_peft_model(Net(checkpointing), config)
    integration.enable()
    model(IDS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    start = computed(model)
    assert len(start) == 5
    for step in range(3):
        for _ in range(8):
            model(IDS).square().mean().backward()
        with torch.no_grad():
            model.eval()(IDS)
            model.train()
        assert computed(model) == [n + step for n in start]
        optimizer.step()
        optimizer.zero_grad()
    integration.disable()
    model.eval()
    expected = model(IDS)
    integration.enable()
    assert_close(model(IDS), expected, 1e-5)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_stale_norms(name):
    """Whatever changes W, A or B is seen in the next forward, also what leaves no trace on the host."""
    layer, x = peft_layer(make_base(name)), make_input(name)
    layer(x)
    part = "lora_embedding_B" if name == "embedding" else "lora_B"
    B = getattr(layer, part)["default"]
    B = B if isinstance(B, nn.Parameter) else B.weight
    changes = [
        lambda: layer.base_layer.weight.data.mul_(0.5),
        lambda: B.data.copy_(torch.randn_like(B)),
        lambda: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}),
        lambda: layer.set_scale("default", 3.0),
        lambda: (layer.merge(), layer.unmerge()),
        lambda: layer.double().float(),
        lambda: torch.optim.SGD([B.requires_grad_()], lr=0.1).step(),
    ]
    for change in changes:
        change()
        copied = copy.deepcopy(layer)
        integration.disable()
        expected = copied(x)
        integration.enable()
        assert_close(layer(x), expected, 1e-5)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "embedding", "conv2d"])
def test_nothing_is_kept_alive(name):
    layer, x = peft_layer(make_base(name)), make_input(name)
    gc.collect()
    gc.disable()
    try:
        y = layer(x)
        output, base = StorageWeakRef(y.untyped_storage()), weakref.ref(layer.base_layer)
        del y
        assert output.expired()
        y = layer(x)
        y.sum().backward()
        del layer, y
        gc.collect()
        assert base() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("made_before", [True, False])
def test_invalidate_norms(made_before):
    if made_before:
        integration.disable()
    layer, x = peft_layer(nn.Linear(12, 10)), torch.randn(3, 12)
    integration.enable()
    layer(x), layer(x)
    assert computed(layer) == [1]
    dora_ext.invalidate_norms(layer)
    assert computed(layer) == [0]
    layer(x)
    assert computed(layer) == [1]
