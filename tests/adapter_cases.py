"""What the adapter tests share: a model with every kind of layer that has a DoRA twin, and ways to spoil a file."""

import json

import torch
from torch import nn

from dora_ext.adapter import CONFIG_NAME, WEIGHTS_NAME


class Net(nn.Module):
    """Every kind of layer that has a DoRA twin, a nested path, and a head that a language model would have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2))
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.lm_head = nn.Linear(6, 13, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        y = self.conv2(self.conv1(x.transpose(1, 2))[:, None])
        z = self.conv3(y[:, :1, None].expand(-1, -1, 2, -1, -1))
        return z, self.lm_head(x)


ALL = ["embed", "up", "down", "conv1", "conv2", "conv3"]
IDS = torch.arange(10).view(2, 5) % 13


def expert_model():
    """Numbers within numbers, as in a mixture of experts, and a list of blocks at the top."""

    def block():
        return nn.ModuleDict(
            {
                "attn": nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q_proj", "k_proj", "out_proj")}),
                "experts": nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(4, 6)}) for _ in range(3)),
                "mlp": nn.ModuleDict({"up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}),
            }
        )

    decoder = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(3)), "embed": nn.Embedding(5, 4)})
    return nn.ModuleDict(
        {
            "model": decoder,
            "h": nn.ModuleList(block() for _ in range(2)),
            "q_proj": nn.Linear(4, 4),
            "xq_proj": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 3),
            "head": nn.Linear(4, 5),
        }
    )


def move(model):
    """As after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def assert_same(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    from safetensors import torch as safetensors_torch

    tensors = safetensors_torch.load_file(folder / WEIGHTS_NAME)
    change(tensors)
    safetensors_torch.save_file(tensors, folder / WEIGHTS_NAME)


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
