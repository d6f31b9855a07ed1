"""Adapters in kohya's format: against plain float64 formulas, and LyCORIS's own modules where it is installed."""

import copy
import re

import pytest
import torch
from adapter_cases import IDS, Net, assert_same
from kohya_cases import LAYERS, kohya, write
from torch import nn
from torch.func import functional_call

from dora_ext import inject, load_kohya, merge, save_adapter, trainable_parameters, unload
from dora_ext.injection import dora_layers, folded_layers
from dora_ext.testing import DEVICES, assert_close

pytest.importorskip("safetensors.torch")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.mark.parametrize("by_input", [(), LAYERS, ["blocks.1.down", "conv2"]], ids=["outputs", "inputs", "mixed"])
@pytest.mark.parametrize("alpha", [3.0, None])
@pytest.mark.parametrize("device", DEVICES)
def test_output_is_the_formula(net, tmp_path, by_input, alpha, device):
    tensors, weights = kohya(net, by_input=by_input, alpha=alpha)
    expected = [y.to(device) for y in functional_call(net, weights, IDS)]
    net, ids = net.to(device), IDS.to(device)
    path = write(tmp_path, tensors)
    if by_input:
        with pytest.warns(UserWarning, match=rf"{len(by_input)} layers \({sorted(by_input)[0]}, .*they are folded"):
            assert load_kohya(net, path) is net
    else:
        assert load_kohya(net, path) is net
    assert set(folded_layers(net)) == set(by_input)
    assert set(dora_layers(net)) == set(LAYERS) - set(by_input)
    assert_same(net(ids), expected, 1e-12)
    for name in LAYERS:
        layer = net.get_submodule(name)
        assert_close((layer if name in by_input else layer.to_base()).weight, weights[f"{name}.weight"], 1e-12)
    unload(net, merge=True)
    assert_same(net(ids), expected, 1e-12)
    assert not dora_layers(net) and not folded_layers(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_input", [(), LAYERS], ids=["outputs", "inputs"])
@pytest.mark.filterwarnings("ignore:.*they are folded")
def test_half_precision_files(net, tmp_path, dtype, by_input):
    """Into half-precision models, too: the folded weight is computed in float32 and rounded once."""
    tensors, weights = kohya(net, by_input=by_input, dtype=dtype)
    path, expected = write(tmp_path, tensors), functional_call(net, weights, IDS)
    half = load_kohya(copy.deepcopy(net).to(dtype), path)
    assert_same(load_kohya(copy.deepcopy(net).float(), path)(IDS), expected)
    assert_same([y.double() for y in half(IDS)], expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)
    for name in by_input:
        weight = half.get_submodule(name).weight
        assert weight.dtype == dtype
        assert_close(weight, weights[f"{name}.weight"], 4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert {p.dtype for p in trainable_parameters(half)} == (set() if by_input else {torch.float32})


def test_scales_tell_themselves_apart(tmp_path):
    """By which side of them is 1, also where the weight is square, or a side of it 1."""
    for out, inputs in ((4, 4), (1, 4), (4, 1), (1, 1)):
        for by_input in ((), ("layer",)):
            model = nn.ModuleDict({"layer": nn.Linear(inputs, out).double()})
            tensors, weights = kohya(model, ["layer"], by_input)
            x = torch.randn(3, inputs, dtype=torch.float64)
            expected = functional_call(model["layer"], {"weight": weights["layer.weight"]}, x)
            if by_input and inputs * out > 1:  # of 1 x 1 both are the same
                with pytest.warns(UserWarning, match="folded"):
                    load_kohya(model, write(tmp_path, tensors))
            else:
                load_kohya(model, write(tmp_path, tensors))
            assert_close(model["layer"](x), expected, 1e-12)


def test_zero_columns_are_no_nan(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(4, 3).double()})
    tensors, _ = kohya(model, ["layer"], ["layer"])
    tensors["lora_unet_layer.lora_down.weight"][:, 1] = 0
    with torch.no_grad():
        model["layer"].weight[:, 1] = 0
    with pytest.warns(UserWarning, match="folded"):
        load_kohya(model, write(tmp_path, tensors))
    assert (
        torch.equal(model["layer"].weight[:, 1], torch.zeros(3).double())
        and torch.isfinite(model["layer"].weight).all()
    )


def test_training_goes_on(net, tmp_path):
    tensors, _ = kohya(net, ["blocks.0.up", "conv1"])
    load_kohya(net, write(tmp_path, tensors))
    assert len(trainable_parameters(net)) == 6
    assert not any(p.requires_grad for n, p in net.named_parameters() if "lora_" not in n)
    net(IDS)[0].sum().backward()
    assert all(p.grad.norm() > 0 for p in trainable_parameters(net))
    save_adapter(net, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore:.*they are folded")
def test_unload_and_merge(net, tmp_path):
    before, expected = {n: (p, p.requires_grad) for n, p in net.named_parameters()}, net(IDS)
    tensors, weights = kohya(net, by_input=["conv1", "blocks.0.up"])
    changed = functional_call(net, weights, IDS)
    load_kohya(net, write(tmp_path, tensors))
    assert_same(merge(net)(IDS), changed, 1e-12)
    with pytest.raises(ValueError, match=r"save_adapter: blocks\.0\.up has a magnitude for each input"):
        save_adapter(net, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    for layer in dora_layers(net).values():
        layer.unmerge()
    unload(net)
    assert {n: (p, p.requires_grad) for n, p in net.named_parameters()} == before
    assert all(torch.equal(a, b) for a, b in zip(net(IDS), expected, strict=True))


def test_into_layers_that_are_there(net, tmp_path):
    tensors, weights = kohya(net, ["blocks.0.up", "blocks.1.up"])
    expected = functional_call(net, weights, IDS)
    inject(net, ["up"], r=2, alpha=3)
    net(IDS)  # norms are kept now
    load_kohya(net, write(tmp_path, tensors))
    assert_same(net(IDS), expected, 1e-12)


def test_shapes_of_other_writers(net, tmp_path):
    """Linear layers written as 1x1 convolutions, and convolutions written flat."""
    tensors, weights = kohya(net)
    for key, value in tensors.items():
        if "up.lora" in key or "down.lora" in key:
            tensors[key] = value[..., None, None]
        elif "conv" in key and value.dim() > 2:
            tensors[key] = value.flatten(1)
    expected = functional_call(net, weights, IDS)
    assert_same(load_kohya(net, write(tmp_path, tensors))(IDS), expected, 1e-12)


def test_names(net, tmp_path):
    """Another prefix, paths with dots as ComfyUI writes them, and keys for other models left out on demand."""
    tensors, weights = kohya(net, ["blocks.0.up"], prefix="lora_te1_")
    expected = functional_call(net, weights, IDS)
    others = kohya(net, ["conv1"])[0]
    path = write(tmp_path, tensors | others)
    assert_same(load_kohya(copy.deepcopy(net), path, prefix="lora_te1_", other_prefixes=["lora_unet_"])(IDS), expected)
    dotted = {re.sub("^lora_te1_blocks_0_up", "diffusion_model.blocks.0.up", k): v for k, v in tensors.items()}
    assert_same(load_kohya(net, write(tmp_path, dotted), prefix="diffusion_model.")(IDS), expected)


@pytest.mark.parametrize("on_outputs", [True, False])
@pytest.mark.filterwarnings("ignore:.*they are folded")
def test_as_lycoris(tmp_path, on_outputs):
    """Its own modules, its own file, its own output."""
    lycoris = pytest.importorskip("lycoris")
    net = nn.ModuleDict({"up": nn.Linear(6, 10), "conv": nn.Conv2d(3, 4, 3, stride=2, padding=1)})
    fresh = copy.deepcopy(net)
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["ModuleDict"], "target_name": []})
    adapter = lycoris.create_lycoris(
        net, 1.0, linear_dim=3, linear_alpha=2, conv_dim=2, conv_alpha=1, dora_wd=True, wd_on_output=on_outputs
    )
    adapter.apply_to()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tensors = {key: value.detach().clone().contiguous() for key, value in adapter.state_dict().items()}
    load_kohya(fresh, write(tmp_path, tensors), prefix="lycoris_")
    for name, x in (("up", torch.randn(5, 6)), ("conv", torch.randn(2, 3, 7, 6))):
        assert_close(fresh[name](x), net[name](x), 1e-5)
        assert not torch.allclose(fresh[name](x), fresh[name].base_layer(x), rtol=1e-2)
