"""Inference of one linear layer for one token and for eight, adapter not merged, over dense and NF4 weights (nested
scales).

device: of a CUDA graph that goes round so many layers that each finds its weights in device memory; per layer. While a
graph is captured DoraLinear computes the norm anew, so ours is the function with the norm at hand. wall: the layer,
eager, with a norm that it kept.
"""

import gc
from collections.abc import Callable

import torch

from .bench_linear import _error
from .bench_nf4 import linear4bit
from .measure import device_ms, interleaved_cpu_ms, wall_ms
from .rivals import OURS, Problem, Shape, _ours, _peft

KEY = "decode"
TITLE = "Inference of one linear layer, one and eight tokens"
NAMES = {
    "linear": "frozen linear, or Linear4bit",
    "peft_lora": "PEFT LoRA, QLoRA",
    "peft_dora": "PEFT DoRA, QDoRA",
    OURS: "dora_ext DoRA",
}
DENSE, PACKED = "dense", "NF4"
CUDA_ROWS = [
    (Shape(1, 4096, 4096, 16), PACKED),
    (Shape(1, 4096, 4096, 16), DENSE),
    (Shape(1, 4096, 14336, 16), PACKED),
    (Shape(1, 4096, 14336, 16), DENSE),
    (Shape(1, 8192, 28672, 16), PACKED),
    (Shape(1, 14336, 4096, 16), PACKED),
    (Shape(1, 14336, 4096, 16), DENSE),
    (Shape(8, 4096, 14336, 16), PACKED),
    (Shape(8, 4096, 14336, 16), DENSE),
]
CPU_ROWS = [(Shape(1, 2048, 2048, 16), PACKED), (Shape(1, 2048, 2048, 16), DENSE)]

Call = Callable[[], object]


def run(device: str, quick: bool, note) -> list[dict]:
    rows = []
    for shape, weights in (CUDA_ROWS if device == "cuda" else CPU_ROWS)[: 2 if quick else None]:
        note(f"{KEY}: {shape}, {weights}")
        measure = on_cuda if device == "cuda" else on_cpu
        rows.append(vars(shape) | {"weights": weights, "rivals": measure(shape, weights, quick)})
    return rows


def build(name: str, weights: str, problem: Problem) -> tuple[Call, Call]:
    """The layer on the problem's x, and the same with nothing left to compute but its answer."""
    packed, x = weights == PACKED, problem.x
    if name == OURS:
        layer = _ours(problem, quantize="nf4" if packed else None)
        at_hand = _with_norm_at_hand(layer, x)
    else:
        base = linear4bit(problem) if packed else problem.base()
        layer = base if name == "linear" else _peft(problem, use_dora=name == "peft_dora", base=base)
        at_hand = None
    layer.eval()

    def call() -> object:
        return layer(x)

    return call, at_hand or call


def _with_norm_at_hand(layer, x: torch.Tensor) -> Call:
    from dora_ext.nn.base_weight import packed_weight
    from dora_ext.ops import dora_linear, norm_and_gain, norm_and_gain_nf4

    adapter, s = (*layer._factors(), layer.magnitude), layer.scaling
    if not layer.quantised:
        weight = layer.base_layer.weight
        norm, gain = norm_and_gain(weight, *adapter, scaling=s)
        return lambda: dora_linear(x, weight, *adapter, layer.bias, scaling=s, norm=norm, gain=gain)
    packed = packed_weight(layer.base_layer)
    norm, gain = norm_and_gain_nf4(packed, *adapter, scaling=s)
    forward = torch.ops.dora_ext.linear_nf4_forward.default
    return lambda: forward(x, *packed.operands(), *adapter, layer.bias, norm, gain, s, None, None)


@torch.no_grad()
def on_cuda(shape: Shape, weights: str, quick: bool) -> dict[str, dict]:
    """bf16, no bias."""
    problem = Problem.random(shape, "cuda", torch.bfloat16, bias=False)
    bytes_of_weight = problem.weight.numel() * (0.52 if weights == PACKED else 2)
    layers = 2 + int(1.5 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_of_weight)
    results = {}
    for name in NAMES:
        result = results[name] = {}
        try:
            calls = [build(name, weights, problem) for _ in range(layers)]
            result["wall_ms"] = wall_ms(calls[0][0], lambda: None, 8 if quick else 30)

            def around() -> None:
                for _, at_hand in calls:  # noqa: B023
                    at_hand()

            result["device_ms"] = device_ms(around, 8 if quick else 30) / layers
        except Exception as error:  # one rival's failure is a result of its own
            result |= _error(error)
        calls = around = None
        gc.collect()
        torch.cuda.empty_cache()
    return results


@torch.no_grad()
def on_cpu(shape: Shape, weights: str, quick: bool) -> dict[str, dict]:
    """fp32, with bias; from the same code as more tokens."""
    problem = Problem.random(shape, "cpu", torch.float32, bias=True)
    results: dict[str, dict] = {}
    calls: dict[str, tuple[Call, Call]] = {}
    for name in NAMES:
        try:
            calls[name] = (build(name, weights, problem)[0], lambda: None)
            calls[name][0]()
            results[name] = {}
        except Exception as error:
            calls.pop(name, None)
            results[name] = _error(error)
    for name, ms in interleaved_cpu_ms(calls, rounds=5 if quick else 41).items():
        results[name]["wall_ms"] = ms
    return results


def table(rows: list[dict]) -> list[str]:
    """Markdown: a column for each rival, a cell for what it took."""
    on_gpu = any("device_ms" in result for row in rows for result in row["rivals"].values())
    formats = {"device_ms": "{:.1f}", "wall_ms": "{:.0f}"} if on_gpu else {"wall_ms": "{:.0f}"}
    captions = [f"**{caption}**" if name == OURS else caption for name, caption in NAMES.items()]
    lines = [
        f"Each cell: {' / '.join(m.removesuffix('_ms') for m in formats)} µs.",
        "",
        "| tokens, in → out, r | W | " + " | ".join(captions) + " |",
        "|---" * (len(NAMES) + 2) + "|",
    ]
    for row in rows:
        shape = Shape(row["tokens"], row["in_features"], row["out_features"], row["r"])
        cells = [
            "failed" if "error" in result else " / ".join(f.format(1e3 * result[m]) for m, f in formats.items())
            for result in (row["rivals"][name] for name in NAMES)
        ]
        lines.append(f"| {shape} | {row['weights']} | " + " | ".join(cells) + " |")
    return lines
