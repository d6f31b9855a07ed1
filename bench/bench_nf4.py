"""A training step over a 4-bit base (NF4, nested scales): PEFT over bitsandbytes' Linear4bit, and ours over the same
layer and over NF4 storage of our own. Steps and clocks are those of bench/training_step.py."""

from functools import partial

from . import bench_linear, rows
from .rivals import BYTES_PER_NF4_WEIGHT, OURS, Problem, Rival, linear4bit, our_layer, peft_layer
from .shapes import LinearShape
from .training_step import ON

KEY = "nf4_step"
TITLE = "Training step of one linear layer over a 4-bit base"
NAMES = {
    "peft_qlora": "PEFT QLoRA",
    "peft_qdora": "PEFT QDoRA",
    f"{OURS}_linear4bit": "dora_ext, Linear4bit",
    OURS: "dora_ext, own NF4",
}
HEADING = LinearShape.heading
SHAPES = {
    "cuda": [LinearShape(4096, 4096, 4096, 16), LinearShape(4096, 4096, 14336, 16), LinearShape(4096, 14336, 4096, 16)],
    "cpu": [LinearShape(512, 2048, 2048, 16), LinearShape(512, 1024, 1024, 16)],
}


def run(device: str, quick: bool, note) -> list[dict]:
    return rows.measured(KEY, SHAPES[device], NAMES, quick, note, partial(ON[device], build=build))


def build(name: str, problem: Problem) -> Rival:
    if name == OURS:
        layer = our_layer(problem, quantize="nf4")
    elif name.startswith(OURS):
        layer = our_layer(problem, linear4bit(problem))
    else:
        layer = peft_layer(problem, use_dora=name == "peft_qdora", base=linear4bit(problem))
    return Rival(layer, layer, problem)


def work(row: dict) -> tuple[float, float]:
    """Operations and bytes as in bench_linear, W packed."""
    operations, moved = bench_linear.work(row)
    return operations, moved - (2 - BYTES_PER_NF4_WEIGHT) * row["in_features"] * row["out_features"]


def label(row: dict) -> str:
    return bench_linear.label(row)


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label)
