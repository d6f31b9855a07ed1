"""Every whole layer in training: autocast, torch.compile, checkpointing, optimizers, sharding; norms that follow."""

import copy

import pytest
import torch
from module_cases import (
    ALL_BASES,
    ONE_OF_EACH,
    assert_same,
    dora_class,
    make_base,
    make_input,
    make_layer,
    run,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dora_ext import invalidate_norms, reference
from dora_ext.ops import dora_linear
from dora_ext.testing import DEVICES, assert_close


def compiled(layer: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name, device, options):
    """Half-precision products of float32 weights; the norm stays that of the float32 weights."""
    layer, x = make_layer(name, device=device, **options), make_input(name, device=device)
    expected = run(layer, x)
    with torch.autocast(device, torch.bfloat16):
        results = run(layer, x)
    embedding = name.startswith("embedding")  # F.embedding isn't cast either
    assert results["output"].dtype == (torch.float32 if embedding else torch.bfloat16)
    for key, value in results.items():
        assert key == "output" or value.dtype == torch.float32
        assert_close(value, expected[key], 1e-6 if embedding else 1e-2, key)


@pytest.mark.parametrize("name", ALL_BASES)
def test_gradcheck(name, monkeypatch):
    """With the norm held constant, as section 4.3 of the paper has it."""
    if name == "embedding max_norm":
        pytest.skip("its forward changes A")
    layer, x = make_layer(name, torch.float64), make_input(name, torch.float64)
    norm = layer.weight_norm()

    def constants(*_):
        return norm, reference.gain(layer.magnitude.detach().flatten(), norm)

    def with_constants(*args, cache, **options):  # a linear layer's norm is made inside its call
        return dora_linear(*args, **options, **dict(zip(("norm", "gain"), constants(), strict=True)))

    layer._norm_and_gain = constants
    monkeypatch.setattr("dora_ext.nn.linear.dora_linear", with_constants)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    parameters = [dict(layer.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    by_freq_or_padding = name in ("embedding padding", "embedding by freq", "embedding scaled")
    if by_freq_or_padding:  # their gradient of A is not the derivative, on purpose
        parameters[0].requires_grad_(False)

    def call(x, *tensors):
        return functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "conv1d grouped", "conv2d circular"])
def test_compiled(name, device, options):
    """In one graph. Dropout's random numbers are others there, so only that it runs and stays near is asked."""
    layer, x = make_layer(name, device=device, **options), make_input(name, device=device)
    expected = run(layer, x)
    results = run(compiled(layer), x)
    results = {k.removeprefix("_orig_mod."): v for k, v in results.items()}
    if not options:
        assert_same(results, expected, 1e-5)
    layer.eval()
    assert_close(compiled(layer)(x), layer(x), 1e-5)
    layer.merge()
    assert_close(compiled(layer)(x), layer(x), 1e-5)


@pytest.mark.slow
def test_compiled_with_inductor():
    torch._dynamo.reset()
    layer, x = make_layer("linear"), make_input("linear")
    expected = run(layer, x)
    results = run(torch.compile(layer, fullgraph=True), x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in results.items()}, expected, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_checkpointing(name, use_reentrant):
    layer, x = make_layer(name, dropout=0.3), make_input(name)
    expected = run(layer, x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=use_reentrant)

    layer.zero_grad()
    outer = Checkpointed()
    outer.named_parameters = layer.named_parameters
    outer.zero_grad = layer.zero_grad
    assert_same(run(outer, x), expected, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_norms_follow_training(name, device):
    """Steps of an optimizer, load_state_dict, writes through .data: each forward is that of a fresh copy."""
    layer, x = make_layer(name, device=device), make_input(name, device=device)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)

    def check():
        assert_close(layer(x), copy.deepcopy(layer)(x), 1e-6)

    for _ in range(3):
        run(layer, x)
        optimizer.step()
        check()
    first, second = layer._factors()
    for change in (
        lambda: layer.load_state_dict(make_layer(name, device=device).state_dict()),
        lambda: first.data.mul_(3),
        lambda: second.data.add_(0.1),
        lambda: layer.base_layer.weight.data.mul_(0.3),
        lambda: (layer.merge(), layer.unmerge()),
        lambda: layer.reset_parameters(),
        lambda: invalidate_norms(layer),
    ):
        change()
        check()


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv1d grouped"])
def test_autocast_touches_no_norm_and_no_merged_weight(name):
    layer = make_layer(name)
    norm, weight = layer.weight_norm(), layer.to_base().weight
    with torch.autocast("cpu", torch.bfloat16):
        layer.norm_cache.clear()
        assert_close(layer.weight_norm(), norm, 1e-6)
        assert_close(layer.to_base().weight, weight, 1e-6)


def test_norms_are_reused():
    for name in ONE_OF_EACH:
        layer, x = make_layer(name), make_input(name)
        layer.norm_cache.clear()
        for _ in range(3):
            run(layer, x)
        assert layer.norm_cache.computed == 1, name


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "conv1d grouped"])
def test_meta_device(name):
    """Construct without memory, then materialise and load, or reset."""
    with torch.device("meta"):
        base = make_base(name, device="meta")
    layer = dora_class(base).from_base(base, r=4, alpha=6)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    expected = make_layer(name)
    layer.load_state_dict(expected.state_dict())
    x = make_input(name)
    assert_same(run(layer, x), run(expected, x), 0)
    layer.reset_parameters()
    assert_close(layer(x), expected.base_layer(x), 1e-6)
    by_assigning = dora_class(base).from_base(make_base(name, device="meta"), r=4, alpha=6)
    by_assigning.load_state_dict(expected.state_dict(), assign=True)
    assert_same(run(by_assigning.train(), x), run(expected, x), 0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shapes_are_worked_out_on_the_meta_device(name):
    real, x = make_layer(name), make_input(name)
    meta = copy.deepcopy(real).to("meta")
    y, expected = meta(x.detach().to("meta").requires_grad_(x.requires_grad)), real(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", expected.shape, expected.dtype)
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in meta.parameters() if p.requires_grad)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_fully_sharded(name, one_rank):
    """FSDP2: parameters are DTensors between forwards; training steps, norms and merging are those of a plain layer."""
    from torch.distributed.fsdp import fully_shard

    expected, x = make_layer(name), make_input(name)
    sharded = copy.deepcopy(expected)
    fully_shard(sharded, mesh=one_rank)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (expected, sharded)]
    for _ in range(3):
        for layer, optimizer in zip((expected, sharded), optimizers, strict=True):
            run(layer, x)
            optimizer.step()
        assert_close(sharded(x), expected(x), 1e-6)
        sharded.reshard()  # FSDP2 leaves its outermost module whole after a forward
    assert type(sharded.magnitude).__name__ != "Parameter"
    assert_close(sharded.weight_norm(), expected.weight_norm(), 1e-6)
    for layer in (expected, sharded):
        layer.merge()
    assert_close(sharded(x), expected(x), 1e-6)
