"""Inference of one linear layer for many tokens, adapter not merged. Clocks as in bench/inference.py; all calls are of
the one layer."""

from . import inference, rows
from .bench_linear import COMPILED_SHAPES, NAMES
from .shapes import LinearShape

KEY = "forward"
TITLE = "Inference of one linear layer, many tokens"
HEADING = LinearShape.heading
SHAPES = {
    "cuda": [
        LinearShape(4096, 4096, 4096, 16),
        LinearShape(4096, 4096, 4096, 384),
        LinearShape(4096, 4096, 14336, 16),
        LinearShape(4096, 4096, 14336, 384),
    ],
    "cpu": [
        LinearShape(512, 2048, 2048, 16),
        LinearShape(512, 2048, 2048, 64),
        LinearShape(512, 576, 1536, 8),
    ],
}


def run(device: str, quick: bool, note) -> list[dict]:
    measure = inference.on_cuda if device == "cuda" else inference.on_cpu
    shapes = SHAPES[device][: 2 if quick else None]
    return rows.measured(KEY, shapes, NAMES, quick, note, measure, COMPILED_SHAPES)


def work(row: dict) -> tuple[float, float]:
    """Operations and bytes, as bench/inference.py counts them, in bf16."""
    return inference.work(LinearShape.of(row), bytes_per_weight=2)


def label(row: dict) -> str:
    return str(LinearShape.of(row))


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label)
