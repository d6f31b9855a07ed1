"""The five layer types as the module tests use them: base layers, inputs, PEFT's layer around the same base."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from dora_ext import DoraConv1d, DoraConv2d, DoraConv3d, DoraEmbedding, DoraLinear
from dora_ext.testing import assert_close


def gpt2_conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 12)


def gemma_embedding() -> nn.Module:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return gemma.Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=2.5)


# name: (base layer, shape of its input; () for ids)
BASES = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), (7, 12)),
    "gpt2 conv1d": (gpt2_conv1d, (3, 5, 12)),
    "embedding": (lambda: nn.Embedding(20, 8), ()),
    "embedding padding": (lambda: nn.Embedding(20, 8, padding_idx=3), ()),
    "embedding by freq": (lambda: nn.Embedding(20, 8, scale_grad_by_freq=True), ()),
    "embedding max_norm": (lambda: nn.Embedding(20, 8, max_norm=2.0), ()),
    "embedding scaled": (gemma_embedding, ()),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 2, 4, 3, 5)),
}
# PEFT gets these wrong, or cannot do them at all.
BASES_BEYOND_PEFT = {
    "conv1d grouped": (lambda: nn.Conv1d(4, 8, 3, groups=2), (2, 4, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 8, 8)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv1d reflect same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect"), (2, 4, 9)),
}
ALL_BASES = BASES | BASES_BEYOND_PEFT
ONE_OF_EACH = ["linear", "gpt2 conv1d", "embedding", "conv1d", "conv2d", "conv3d"]


def make_base(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    return ALL_BASES[name][0]().to(device, dtype)


def make_input(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    shape = ALL_BASES[name][1]
    if not shape:
        return torch.randint(20, (4, 6), device=device)  # some ids repeat
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def dora_class(base: nn.Module) -> type[nn.Module]:
    for kind, cls in (
        (nn.Embedding, DoraEmbedding),
        (nn.Conv1d, DoraConv1d),
        (nn.Conv2d, DoraConv2d),
        (nn.Conv3d, DoraConv3d),
    ):
        if isinstance(base, kind):
            return cls
    return DoraLinear


def train_a_little(layer: nn.Module) -> nn.Module:
    """Nothing is trivially zero or equal any more: B A is not 0 and m is not n."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(layer.named_parameters()):
            if "lora_" not in name:
                continue
            noise = torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            p.copy_(p * (0.6 + noise) if "magnitude" in name else (noise - 0.5))
    return layer


def make_layer(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> nn.Module:
    """A whole DoRA layer in mid-training."""
    base = make_base(name, dtype, device)
    return train_a_little(dora_class(base).from_base(base, **{"r": 4, "alpha": 6, **options}))


def peft_layer(
    base: nn.Module, r: int = 4, alpha: float = 6, dropout: float = 0.0, use_rslora: bool = False, **options
):
    """PEFT's own DoRA layer around a copy of `base`, in mid-training."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, use_dora=True, target_modules=["layer"],
        fan_in_fan_out=type(base).__name__ == "Conv1D",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(OrderedDict(layer=copy.deepcopy(base))), config)
    return train_a_little(model.base_model.model.layer)


def run(layer: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """The output and every gradient for one fixed gradient of the output."""
    layer.zero_grad()
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    y = layer(leaf)
    generator = torch.Generator().manual_seed(seed)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype))
    results = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert all(g is not None for g in results.values()), f"no gradient: {[k for k, g in results.items() if g is None]}"
    return {"output": y.detach(), **({} if leaf.grad is None else {"x": leaf.grad}), **results}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, f"{name}: {ours[name].dtype}, expected {theirs[name].dtype}"
        assert theirs[name].norm() > 0, f"{name}: nothing to compare"
        assert_close(ours[name], theirs[name], tolerance, name)
