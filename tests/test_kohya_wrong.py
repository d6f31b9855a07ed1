"""Files in kohya's format that are refused: what the error names, and that the model is as it was."""

import pytest
import torch
from adapter_cases import Net, truncate
from kohya_cases import kohya, write
from torch import nn

from dora_ext import inject, load_kohya
from dora_ext.files import AdapterError

pytest.importorskip("safetensors.torch")

UP = "lora_unet_blocks_0_up"
CONV = "lora_unet_conv2"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def snapshot(model):
    return {n: (p, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_refused(model, path, message, **options):
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(AdapterError, match=message):
        load_kohya(model, path, **options)
    assert dict(model.named_modules()) == modules
    for name, parameter in model.named_parameters():
        same, flag, value = before[name]
        assert parameter is same and parameter.requires_grad == flag and torch.equal(parameter, value)


def ones(*shape):
    return torch.ones(*shape)


# What is put into a good file (None: taken out), and what the error must say.
WRONG = {
    "no up": ({f"{UP}.lora_up.weight": None}, r"missing key blocks\.0\.up: lora_up\.weight"),
    "no down": ({f"{UP}.lora_down.weight": None}, r"missing key blocks\.0\.up: lora_down\.weight"),
    "plain LoRA": ({f"{UP}.dora_scale": None}, r"blocks\.0\.up has no dora_scale: plain LoRA is not DoRA"),
    "no such layer": (
        {"lora_unet_mid_up.lora_down.weight": ones(2, 6), "lora_unet_mid_up.alpha": ones(())},
        r"(?s)unknown key lora_unet_mid_up\.alpha: the model has no .*unknown key lora_unet_mid_up\.lora_down\.weight",
    ),
    "other prefix": (
        {"lora_te1_up.alpha": ones(())}, "unknown key lora_te1_up.alpha: expected prefix='lora_unet_', or one of"),
    "unknown part": ({f"{UP}.lora_side.weight": ones(2)}, rf"unknown key {UP}\.lora_side\.weight"),
    "no dot": ({"extra": ones(2)}, "unknown key extra"),
    "Tucker": ({f"{CONV}.lora_mid.weight": ones(2, 2, 3, 3)}, rf"{CONV}\.lora_mid\.weight is a Tucker decomposition"),
    "LoHa": ({f"{UP}.hada_w1_a": ones(2, 2)}, rf"{UP}\.hada_w1_a is LoHa: not supported"),
    "LoKr": ({f"{UP}.lokr_w1": ones(2, 2)}, rf"{UP}\.lokr_w1 is LoKr: not supported"),
    "OFT": ({f"{UP}.oft_blocks": ones(2, 2)}, rf"{UP}\.oft_blocks is OFT: not supported"),
    "GLoRA": ({f"{UP}.a1.weight": ones(2, 2)}, rf"{UP}\.a1\.weight is GLoRA: not supported"),
    "IA3": ({f"{UP}.on_input": ones(2)}, rf"{UP}\.on_input is IA3: not supported"),
    "full": ({f"{UP}.diff": ones(10, 6)}, rf"{UP}\.diff is a full difference of weights: not supported"),
    "norms": ({"lora_unet_norm.w_norm": ones(6)}, r"lora_unet_norm\.w_norm is a trained norm layer: not supported"),
    "PEFT's names": ({f"{UP}.lora_A.weight": ones(2, 6)}, "lora_A.weight is under PEFT's names, .* load_adapter"),
    "down's shape": (
        {f"{UP}.lora_down.weight": ones(2, 7)}, r"blocks\.0\.up: lora_down\.weight: got .*\(2, 7\), expected \(2, 6\)"),
    "down is a number": ({f"{UP}.lora_down.weight": ones(())}, r"lora_down\.weight: got shape \(\), expected"),
    "rank 0": (
        {f"{UP}.lora_down.weight": ones(0, 6), f"{UP}.lora_up.weight": ones(10, 0)}, r"got shape \(0, 6\), expected"),
    "up's rank": (
        {f"{UP}.lora_up.weight": ones(10, 3)}, r"blocks\.0\.up: lora_up\.weight: got .*\(10, 3\), expected \(10, 2\)"),
    "kernel": (
        {f"{CONV}.lora_down.weight": ones(2, 1, 3, 2)}, r"got shape \(2, 1, 3, 2\), expected \(2, 1, 3, 3\)"),
    "scale is a vector": (
        {f"{UP}.dora_scale": ones(10)}, r"dora_scale: got shape \(10,\), expected \(10, 1\) or \(1, 6\)"),
    "scale for others": (
        {f"{CONV}.dora_scale": ones(3, 1, 1, 1)}, r"got .*\(3, 1, 1, 1\), expected \(4, 1, 1, 1\) or \(1, 1, 1, 1\)"),
    "alpha 0": ({f"{UP}.alpha": torch.zeros(())}, r"blocks\.0\.up: alpha: expected one positive number, got 0.0"),
    "alpha twice": ({f"{UP}.alpha": ones(2)}, r"alpha: expected one positive number, got \[1.0, 1.0\]"),
    "alpha NaN": ({f"{UP}.alpha": torch.tensor(float("nan"))}, "alpha: expected one positive number, got nan"),
    "integers": ({f"{UP}.lora_up.weight": ones(10, 2).int()}, rf"{UP}\.lora_up\.weight: expected floating .*int32"),
    "embedding": (
        {"lora_unet_embed.lora_down.weight": ones(2, 6)}, "embed: expected a linear layer or a conv.*, got Embedding"),
    "container": (
        {"lora_unet_blocks_0.lora_down.weight": ones(2, 6)}, r"blocks\.0: expected a linear layer .*, got ModuleDict"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_changes_nothing(net, tmp_path, case):
    change, message = WRONG[case]
    tensors = kohya(net, ["blocks.0.up", "conv2"], by_input=["conv2"], dtype=torch.float32)[0] | change
    path = write(tmp_path, {key: value for key, value in tensors.items() if value is not None})
    assert_refused(net, path, message)


def test_all_problems_are_listed(net, tmp_path):
    tensors, _ = kohya(net, ["blocks.0.up", "conv2"])
    del tensors[f"{UP}.lora_up.weight"], tensors[f"{CONV}.dora_scale"]
    path = write(tmp_path, tensors | {"extra": ones(1)})
    assert_refused(
        net, path, r"(?s)unknown key extra\n.*missing key blocks\.0\.up: lora_up\.weight\n.*conv2 has no dora"
    )


def test_not_safetensors(net, tmp_path):
    path = write(tmp_path, kohya(net)[0])
    truncate(path, 0.6)
    assert_refused(net, path, r"load_kohya: .*adapter\.safetensors: corrupt, truncated or not safetensors")
    path.write_bytes(b"")
    assert_refused(net, path, "corrupt, truncated or not safetensors")
    torch.save({}, path)
    assert_refused(net, path, "corrupt, truncated or not safetensors")
    pickled = tmp_path / "adapter.pt"
    torch.save({}, pickled)
    assert_refused(net, pickled, r"load_kohya: .*adapter\.pt is a pickle")
    with pytest.raises(FileNotFoundError, match=r"load_kohya: no file .*nothing\.safetensors"):
        load_kohya(net, tmp_path / "nothing.safetensors")


def test_nothing_for_the_prefix(net, tmp_path):
    path = write(tmp_path, kohya(net)[0])
    assert_refused(net, path, "no key starts with prefix='lora_te_'", prefix="lora_te_", other_prefixes=["lora_unet_"])


def test_ambiguous_path(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(3, 3)}), "a_b": nn.ModuleDict({"c": nn.Linear(3, 3)})})
    tensors, _ = kohya(model, ["a.b_c"])
    assert_refused(model, write(tmp_path, tensors), r"lora_unet_a_b_c may be a\.b_c or a_b\.c")
    load_kohya(model, write(tmp_path, {k.replace("a_b_c", "a.b_c"): v for k, v in tensors.items()}))


def test_grouped_convolution(tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    assert_refused(
        model, write(tmp_path, kohya(model, ["conv"])[0]), "conv: a convolution with groups=2 is not supported"
    )


def test_quantised_layer_has_no_place_for_columns(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"layer": nn.Linear(64, 64)})
    tensors, _ = kohya(model, ["layer"], by_input=["layer"])
    quantised = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    quantised.load_state_dict(model["layer"].state_dict())
    model["layer"] = quantised.to("cpu")
    assert_refused(
        model, write(tmp_path, tensors), "layer: a magnitude for each input needs a dense weight, and Linear4bit"
    )


@pytest.mark.parametrize(
    "options, by_input, message",
    [
        ({"r": 3, "alpha": 3}, (), r"blocks\.0\.up: rank 2 in the file, 3 in the model"),
        ({"r": 2, "alpha": 4}, (), r"blocks\.0\.up: scaling 1\.5 in the file, 2 in the model"),
        (
            {"r": 2, "alpha": 3},
            ["blocks.0.up"],
            r"blocks\.0\.up is a DoRA layer, which has no place for a magnitude for",
        ),
    ],
)
def test_layers_that_do_not_fit(net, tmp_path, options, by_input, message):
    tensors, _ = kohya(net, ["blocks.0.up", "blocks.1.up"], by_input)
    assert_refused(inject(net, ["up"], **options), write(tmp_path, tensors), message)


def test_layers_without_keys_and_merged_ones(net, tmp_path):
    path = write(tmp_path, kohya(net, ["blocks.0.up"])[0])
    inject(net, ["up"], r=2, alpha=3)
    assert_refused(net, path, r"missing keys: the model's DoRA layer blocks\.1\.up has none")
    net.blocks[0]["up"].merge()
    assert_refused(net, path, r"blocks\.0\.up is merged: call unmerge\(\) first")


@pytest.mark.filterwarnings("ignore:.*they are folded")
def test_folded_layers_take_no_second_adapter(net, tmp_path):
    tensors, _ = kohya(net, ["conv1"], by_input=["conv1"])
    path = write(tmp_path, tensors)
    load_kohya(net, path)
    assert_refused(net, path, r"conv1 has an adapter already: call unload\(\) first")


def test_no_layer_can_be_built(net, tmp_path):
    """What fails after some base layers are frozen makes them trainable again."""
    tensors, _ = kohya(net)
    net.conv3.weight = nn.Parameter(net.conv3.weight.detach().to(torch.complex64))
    assert_refused(net, write(tmp_path, tensors), r"conv3: DoraConv3d: layer: expected a weight in .*complex64")
