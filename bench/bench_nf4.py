"""A training step over a 4-bit base (NF4, nested scales): PEFT over bitsandbytes' Linear4bit, and ours over the same
layer and over NF4 storage of our own. Steps and clocks as in bench_linear."""

from torch import nn

from .bench_linear import on_cpu, on_cuda
from .bench_linear import table as linear_table
from .rivals import OURS, Problem, Rival, Shape, _ours, _peft

KEY = "nf4_step"
TITLE = "Training step of one linear layer over a 4-bit base"
NAMES = {
    "peft_qlora": "PEFT QLoRA",
    "peft_qdora": "PEFT QDoRA",
    f"{OURS}_linear4bit": "dora_ext, Linear4bit",
    OURS: "dora_ext, own NF4",
}
CUDA_SHAPES = [Shape(4096, 4096, 4096, 16), Shape(4096, 4096, 14336, 16), Shape(4096, 14336, 4096, 16)]
CPU_SHAPES = [Shape(512, 2048, 2048, 16), Shape(512, 1024, 1024, 16)]


def run(device: str, quick: bool, note) -> list[dict]:
    rows = []
    for shape in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        note(f"{KEY}: {shape}")
        measure = on_cuda if device == "cuda" else on_cpu
        rows.append(vars(shape) | {"rivals": measure(shape, list(NAMES), quick, build)})
    return rows


def build(name: str, problem: Problem) -> Rival:
    if name == OURS:
        layer = _ours(problem, quantize="nf4")
    elif name.startswith(OURS):
        layer = _ours(problem, linear4bit(problem))
    else:
        layer = _peft(problem, use_dora=name == "peft_qdora", base=linear4bit(problem))
    return Rival(layer, layer, problem)


def linear4bit(problem: Problem) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    dense, dtype = problem.base(), problem.weight.dtype
    bias = dense.bias is not None
    layer = Linear4bit(dense.in_features, dense.out_features, bias, compute_dtype=dtype, quant_type="nf4").to(dtype)
    layer.load_state_dict(dense.state_dict())
    return layer.to(problem.weight.device)


def table(rows: list[dict]) -> list[str]:
    return linear_table(rows, NAMES)
