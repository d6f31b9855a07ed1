"""A layer's op is called past torch.ops in every forward; what torch.ops knows how to treat still goes there."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dora_ext import DoraConv2d, DoraLinear
from dora_ext.ops import _registry

LAYERS = {
    "dense": lambda: DoraLinear.from_base(nn.Linear(64, 32), r=4),
    "nf4": lambda: DoraLinear.from_base(nn.Linear(64, 32), r=4, quantize="nf4", double_quant=True),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param]()
    nn.init.normal_(layer.lora_B.default.weight)
    return layer


class Seen(TorchFunctionMode):
    def __init__(self):
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def count_calls_past_torch_ops(monkeypatch):
    taken = []

    class Module:
        def __getattr__(self, name):
            function = getattr(real, name)

            def call(*args):
                result = function(*args)
                taken.append(result is not NotImplemented)
                return result

            return function if name == "places" else call

    real = _registry._load.module
    monkeypatch.setattr(_registry._load, "module", Module())
    return taken


def step(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y.sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])


def test_the_same_as_through_torch_ops(layer, monkeypatch):
    x = torch.randn(5, 64)
    taken = count_calls_past_torch_ops(monkeypatch)
    here = step(layer, x)
    assert taken == [True]
    with Seen() as seen:
        there = step(layer, x)
    assert taken == [True, False] and any("dora_ext.linear" in name for name in seen.names)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_a_convolution_and_its_norm_too(monkeypatch):
    layer = DoraConv2d.from_base(nn.Conv2d(8, 16, 3), r=4)
    nn.init.normal_(layer.lora_B.default.weight)
    x = torch.randn(2, 8, 6, 5)
    taken = count_calls_past_torch_ops(monkeypatch)
    here = step(layer, x)
    assert taken == [True, True]
    with Seen() as seen:
        there = step(layer, x)
    assert taken == [True, True, False, False]
    assert all(any(f"dora_ext.{op}" in name for name in seen.names) for op in ("norm_cached", "conv"))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other)


def test_what_goes_through_the_dispatcher_still_does(layer):
    x = torch.randn(5, 64)
    with torch.no_grad(), Dispatched() as seen:
        layer(x)
    assert any("dora_ext" in name for name in seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert any(event.key.startswith("dora_ext::linear") for event in profile.key_averages())


def test_subclasses_are_left_to_torch_ops(layer, monkeypatch):
    class Own(torch.Tensor):
        pass

    taken = count_calls_past_torch_ops(monkeypatch)
    x = torch.randn(5, 64)
    y = layer(x.as_subclass(Own))
    assert taken == [False] and isinstance(y, Own)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong", [(1, 2), (None,) * 14, ("x",) * 14, (torch.ones(2),) * 14], ids=["two", "None", "str", "all"]
)
def test_other_arguments_are_not_taken(wrong):
    assert _registry._load.module.linear(*wrong) is NotImplemented


def test_errors_are_those_of_the_op(layer):
    with pytest.raises(ValueError, match="x: expected"):
        layer(torch.randn(5, 63))


def test_other_threads_run_meanwhile(layer):
    """The call holds no lock of Python's: hooks of another thread's backward, which take it, come to an end."""
    import threading

    x, stop, count = torch.randn(4000, 64), threading.Event(), [0]

    def work():
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        layer(x)
    stop.set()
    thread.join(timeout=10)
    assert count[0] > 0 and not thread.is_alive()
