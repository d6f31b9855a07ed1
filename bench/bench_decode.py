"""Inference of one linear layer for one token and for eight, adapter not merged, over dense and NF4 weights (nested
scales). Clocks as in bench/inference.py; device time is of a graph that goes round so many layers that each finds its
weights in device memory."""

import torch

from . import inference, rows
from .rivals import BYTES_PER_NF4_WEIGHT, OURS
from .shapes import LinearShape

KEY = "decode"
TITLE = "Inference of one linear layer, one and eight tokens"
NAMES = {
    "linear": "frozen linear, or Linear4bit",
    "peft_lora": "PEFT LoRA, QLoRA",
    "peft_dora": "PEFT DoRA, QDoRA",
    OURS: "dora_ext DoRA",
}
HEADING = f"{LinearShape.heading}, W"
DENSE, PACKED = "dense", "NF4"
BYTES = {DENSE: 2, PACKED: BYTES_PER_NF4_WEIGHT}
ROWS = {
    "cuda": [
        (LinearShape(1, 4096, 4096, 16), PACKED),
        (LinearShape(1, 4096, 4096, 16), DENSE),
        (LinearShape(1, 4096, 14336, 16), PACKED),
        (LinearShape(1, 4096, 14336, 16), DENSE),
        (LinearShape(1, 8192, 28672, 16), PACKED),
        (LinearShape(1, 14336, 4096, 16), PACKED),
        (LinearShape(1, 14336, 4096, 16), DENSE),
        (LinearShape(8, 4096, 14336, 16), PACKED),
        (LinearShape(8, 4096, 14336, 16), DENSE),
    ],
    "cpu": [(LinearShape(1, 2048, 2048, 16), PACKED), (LinearShape(1, 2048, 2048, 16), DENSE)],
}


def run(device: str, quick: bool, note) -> list[dict]:
    results = []
    for shape, weights in ROWS[device][: 2 if quick else None]:
        note(f"{KEY}: {shape}, {weights}")
        names, packed = list(NAMES), weights == PACKED
        if device == "cuda":
            bytes_of_weight = BYTES[weights] * shape.in_features * shape.out_features
            layers = 2 + int(1.5 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_of_weight)
            measured = inference.on_cuda(shape, names, quick, packed, layers)
        else:
            measured = inference.on_cpu(shape, names, quick, packed)
        results.append(vars(shape) | {"weights": weights, "rivals": measured})
    return results


def work(row: dict) -> tuple[float, float]:
    """Operations and bytes, as bench/inference.py counts them, over weights in bf16 or NF4."""
    return inference.work(LinearShape.of(row), BYTES[row["weights"]])


def label(row: dict) -> str:
    return f"{LinearShape.of(row)}, {row['weights']}"


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label, unit="µs")
