"""Files in kohya's format, and what they mean."""

import torch

LAYERS = ["blocks.0.up", "blocks.1.down", "conv1", "conv2", "conv3"]


def kohya(model, names=LAYERS, by_input=(), r=2, dtype=torch.float64, prefix="lora_unet_", alpha=3.0):
    """A file's tensors for these layers, after some training, and the weights that they mean, in float64."""
    tensors, weights = {}, {}
    for name in names:
        weight = model.get_submodule(name).weight.detach().double()
        out, inputs, *kernel = weight.shape
        ones = [1] * len(kernel)
        down = torch.randn(r, inputs, *kernel).to(dtype)
        up = torch.randn(out, r, *ones).to(dtype)
        shape = (1, inputs, *ones) if name in by_input else (out, 1, *ones)
        scale = (torch.rand(shape) + 0.5).to(dtype)
        stem = prefix + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": scale}
        factor = 1.0
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
            factor = alpha / r
        effective = weight + factor * torch.einsum("or,r...->o...", up.double().flatten(1), down.double())
        dims = [d for d in range(weight.dim()) if d != (1 if name in by_input else 0)]
        norm = effective.square().sum(dims, keepdim=True).sqrt()
        weights[f"{name}.weight"] = effective * scale.double() / norm
    return tensors, weights


def write(folder, tensors):
    from safetensors import torch as safetensors_torch

    path = folder / "adapter.safetensors"
    safetensors_torch.save_file(tensors, path, metadata={"ss_network_module": "lycoris.kohya"})
    return path
