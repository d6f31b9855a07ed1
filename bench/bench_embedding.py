"""A training step of one embedding: forward, and the gradients of A, B and m; of the frozen one, which has no gradient,
forward alone. Steps and clocks are those of bench/training_step.py.

Ours looks at the ids on the host, to refuse those out of range, and waits for them: that is in its wall time. While a
CUDA graph is captured it cannot (such an id then gives a row of NaN), so device time is without.
"""

from . import rows
from .rivals import ADAPTED
from .shapes import EmbeddingShape
from .training_step import ON

KEY = "embedding_step"
TITLE = "Training step of one embedding"
NAMES = {"embedding": "frozen embedding, forward"} | ADAPTED
HEADING = EmbeddingShape.heading
SHAPES = {
    "cuda": [EmbeddingShape(4096, 128256, 4096, 16)],
    "cpu": [EmbeddingShape(512, 8192, 256, 16)],
}


def run(device: str, quick: bool, note) -> list[dict]:
    return rows.measured(KEY, SHAPES[device], NAMES, quick, note, ON[device])


def work(row: dict) -> tuple[float, float]:
    """Bytes of a DoRA step in bf16; its operations take less time than they do. W and A read once for the norm, which
    is taken over the whole vocabulary and is new after each optimizer step; dY read, y and the dense dA written. The
    frozen embedding and LoRA take no norm, and can stay below this."""
    s = EmbeddingShape.of(row)
    return 0, 2 * (s.vocab * s.dim + 2 * s.vocab * s.r + 2 * s.tokens * s.dim)


def label(row: dict) -> str:
    return str(EmbeddingShape.of(row))


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label)
