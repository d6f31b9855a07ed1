"""A training step of one linear layer. Steps and clocks are those of bench/training_step.py."""

from . import rows
from .rivals import ADAPTED
from .shapes import LinearShape
from .training_step import ON

KEY = "linear_step"
TITLE = "Training step of one linear layer"
NAMES = {"linear": "frozen linear"} | ADAPTED
HEADING = LinearShape.heading
SHAPES = {
    "cuda": [
        LinearShape(4096, 4096, 4096, 16),
        LinearShape(4096, 4096, 4096, 64),
        LinearShape(4096, 4096, 4096, 384),
        LinearShape(4096, 4096, 14336, 16),
        LinearShape(4096, 4096, 14336, 64),
        LinearShape(4096, 4096, 14336, 384),
        LinearShape(4096, 14336, 4096, 16),
        LinearShape(4096, 4096, 1024, 16),
        LinearShape(16384, 4096, 4096, 16),
    ],
    "cpu": [
        LinearShape(512, 2048, 2048, 16),
        LinearShape(128, 2048, 2048, 16),
        LinearShape(2048, 1024, 1024, 16),
        LinearShape(512, 2048, 2048, 64),
        LinearShape(512, 576, 1536, 8),
    ],
}
# Compiling takes longer than all the rest, so it is done where it says most.
COMPILED_SHAPES = {LinearShape(4096, 4096, 4096, 16), LinearShape(4096, 4096, 14336, 16)}


def run(device: str, quick: bool, note) -> list[dict]:
    shapes = SHAPES[device][: 2 if quick else None]
    return rows.measured(KEY, shapes, NAMES, quick, note, ON[device], COMPILED_SHAPES)


def work(row: dict) -> tuple[float, float]:
    """Operations and bytes of the frozen layer in bf16, which any adapted one has too: the two products, y = x Wᵀ and
    dX = dY W; x, W and dY read once, y and dX written. The adapter's own products are left out, since how many there
    are is up to an implementation: the larger the rank, the further off the floor is."""
    s = LinearShape.of(row)
    operations = 2 * 2 * s.tokens * s.in_features * s.out_features
    return operations, 2 * (2 * s.tokens * (s.in_features + s.out_features) + s.in_features * s.out_features)


def label(row: dict) -> str:
    return str(LinearShape.of(row))


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label)
