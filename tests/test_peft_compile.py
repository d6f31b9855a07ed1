"""PEFT models on our kernels under torch.compile, checkpointing with compiled blocks, and DDP."""

import copy
from collections import OrderedDict

import pytest
import torch
from module_cases import ONE_OF_EACH, assert_same, make_base, make_input, peft_layer, run
from torch import nn

import dora_ext.integrations.peft as integration
from dora_ext.testing import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def on():
    torch._dynamo.reset()
    with integration.enabled():
        yield


class Renamed(nn.Linear):
    """A base class that nobody has seen yet."""


def compiled_run(layer: nn.Module, x, backend: str) -> dict[str, torch.Tensor]:
    results = run(torch.compile(layer, fullgraph=True, backend=backend), x)
    return {name.removeprefix("_orig_mod."): t for name, t in results.items()}


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_graph(name, made_before):
    if made_before:
        integration.disable()
    layer, x = peft_layer(make_base(name)), make_input(name)
    integration.enable()
    expected = run(layer, x)
    assert_same(compiled_run(layer, x, "aot_eager"), expected, 1e-5)
    # The norm is part of the graph: a changed weight needs no new one.
    torch._dynamo.config.error_on_recompile = True
    try:
        for p in layer.parameters():
            p.data.mul_(1.25)
        for other in ("linear", "conv1d"):  # nor do the layers that run elsewhere
            peft_layer(Renamed(12, 10) if other == "linear" else make_base(other))(make_input(other))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), layer(x), 1e-5)
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_one_graph_with_dropout(name):
    layer, x = peft_layer(make_base(name), dropout=0.4), make_input(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run(layer, x)
    torch.manual_seed(3)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    assert_close(compiled(x), layer(x), 1e-5)


def test_one_graph_of_the_delta_path():
    layer, x = peft_layer(nn.Linear(12, 10)), torch.randn(3, 12)
    layer.base_layer.weight.requires_grad_()
    assert_same(compiled_run(layer, x, "aot_eager"), run(layer, x), 1e-5)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_whole_model(backend):
    model = nn.Sequential(OrderedDict(a=nn.Linear(12, 16), act=nn.GELU(), b=nn.Linear(16, 12)))
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["a", "b"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    x = torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, results = run(model, x), run(compiled, x)
    assert_same({k.removeprefix("_orig_mod."): t for k, t in results.items()}, expected, 1e-5)
    if backend == "aot_eager":
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(compiled(x), model(x), 1e-2)


def test_linear4bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    layer = peft_layer(base.to("cpu"))
    assert integration.report(layer)[""].path == "fused"
    x = torch.randn(5, 64)
    expected = run(layer, x)
    results = run(torch.compile(layer, backend="aot_eager"), x)
    assert_same({k.removeprefix("_orig_mod."): t for k, t in results.items()}, expected, 1e-5)


def test_ddp(tmp_path):
    """One process is enough to see that DDP's hooks on the parameters get their gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "1"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12)), config)
        x = torch.randn(5, 12)
        expected = run(copy.deepcopy(model), x)
        results = run(torch.nn.parallel.DistributedDataParallel(model), x)
        assert_same({k.removeprefix("module."): t for k, t in results.items()}, expected, 1e-6)
    finally:
        torch.distributed.destroy_process_group()
