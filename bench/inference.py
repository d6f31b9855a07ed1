"""Inference of one linear layer, adapter not merged, over dense and NF4 weights (nested scales).

device: of a CUDA graph; per layer, where it goes round several. While a graph is captured DoraLinear computes the norm
anew, so ours is the function with the norm at hand. wall: the layer, eager, with a norm that it kept.
"""

import gc
from collections.abc import Callable

import torch
from torch import nn

from .measure import captured, cpu_ms, device_ms, failure, wall_ms
from .rivals import COMPILED, OURS, Problem, factors, linear4bit, our_layer, peft_layer
from .shapes import LinearShape

Call = Callable[[], object]


def build(name: str, problem: Problem, packed: bool = False) -> tuple[Call, Call]:
    """The layer on the problem's x, and the same with nothing left to compute but its answer."""
    x, at_hand = problem.x, None
    if name == OURS:
        layer = our_layer(problem, quantize="nf4" if packed else None)
        at_hand = with_norm_at_hand(layer, x)
    else:
        base = linear4bit(problem) if packed else problem.base()
        layer = base if name == "linear" else peft_layer(problem, use_dora=name != "peft_lora", base=base)
    layer.eval()
    forward = torch.compile(layer, dynamic=False) if name == COMPILED else layer

    def call() -> object:
        return forward(x)

    return call, at_hand or call


def with_norm_at_hand(layer: nn.Module, x: torch.Tensor) -> Call:
    from dora_ext.nn.base_weight import packed_weight
    from dora_ext.ops import dora_linear, norm_and_gain, norm_and_gain_nf4

    adapter, s = (*factors(layer), layer.magnitude), layer.scaling
    if not layer.quantised:
        weight = layer.base_layer.weight
        norm, gain = norm_and_gain(weight, *adapter, scaling=s)
        return lambda: dora_linear(x, weight, *adapter, layer.bias, scaling=s, norm=norm, gain=gain)
    packed = packed_weight(layer.base_layer)
    norm, gain = norm_and_gain_nf4(packed, *adapter, scaling=s)
    forward = torch.ops.dora_ext.linear_nf4_forward.default
    return lambda: forward(x, *packed.operands(), *adapter, layer.bias, norm, gain, s, None)


@torch.no_grad()
def on_cuda(
    shape: LinearShape, names: list[str], quick: bool, packed: bool = False, layers: int = 1
) -> dict[str, dict]:
    """bf16, no bias."""
    problem = Problem.random(shape, "cuda", torch.bfloat16, bias=False)
    repeats = 8 if quick else 30
    results: dict[str, dict] = {name: {} for name in names}
    first: dict[str, tuple[Call, Call]] = {}
    replays: dict[str, Call] = {}
    for name in names:
        try:
            calls = [build(name, problem, packed) for _ in range(layers)]
            calls[0][0]()
            first[name] = (calls[0][0], lambda: None)
            replays[name] = captured(lambda calls=calls: [at_hand() for _, at_hand in calls])
        except Exception as error:
            results[name] = failure(error)
        calls = None
        gc.collect()
        torch.cuda.empty_cache()
    for name, ms in wall_ms(first, repeats).items():
        results[name]["wall_ms"] = ms
    for name, ms in device_ms(replays, repeats).items():
        results[name]["device_ms"] = ms / layers
    torch._dynamo.reset()
    return results


@torch.no_grad()
def on_cpu(shape: LinearShape, names: list[str], quick: bool, packed: bool = False) -> dict[str, dict]:
    """fp32, with bias."""
    problem = Problem.random(shape, "cpu", torch.float32, bias=True)
    results: dict[str, dict] = {}
    calls: dict[str, tuple[Call, Call]] = {}
    for name in names:
        try:
            calls[name] = (build(name, problem, packed)[0], lambda: None)
            calls[name][0]()
            results[name] = {}
        except Exception as error:
            calls.pop(name, None)
            results[name] = failure(error)
    for name, ms in cpu_ms(calls, 5 if quick else 41).items():
        results[name]["wall_ms"] = ms
    return results


def work(shape: LinearShape, bytes_per_weight: float) -> tuple[float, float]:
    """Operations and bytes: the base layer's product; x, W, A and B read once, y written."""
    s = shape
    features = s.in_features + s.out_features
    moved = 2 * (s.tokens + s.r) * features + bytes_per_weight * s.in_features * s.out_features
    return 2 * s.tokens * s.in_features * s.out_features, moved
