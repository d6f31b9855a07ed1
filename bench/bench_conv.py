"""A training step of one convolution, channels first. Steps and clocks are those of bench/training_step.py."""

from . import rows
from .rivals import ADAPTED
from .shapes import ConvShape
from .training_step import ON

KEY = "conv_step"
TITLE = "Training step of one convolution"
NAMES = {"conv": "frozen convolution"} | ADAPTED
HEADING = ConvShape.heading
SHAPES = {
    "cuda": [
        ConvShape(16, 256, 256, 3, (64, 64), 16),
        ConvShape(8, 320, 640, 3, (32, 32), 16),
        ConvShape(8, 512, 512, 3, (4096,), 16),
    ],
    "cpu": [
        ConvShape(4, 32, 64, 3, (32, 32), 16),
        ConvShape(4, 64, 64, 3, (1024,), 16),
    ],
}


def run(device: str, quick: bool, note) -> list[dict]:
    return rows.measured(KEY, SHAPES[device][: 2 if quick else None], NAMES, quick, note, ON[device])


def work(row: dict) -> tuple[float, float]:
    """Operations and bytes of the frozen layer in bf16, as in bench_linear: forward and dX, each the product that a
    direct convolution is (Winograd's multiplies less often); x, W and dY read once, y and dX written."""
    s = ConvShape.of(row)
    weights = s.in_channels * s.out_channels * s.kernel ** len(s.size)
    return 2 * 2 * s.positions * weights, 2 * (2 * s.positions * (s.in_channels + s.out_channels) + weights)


def label(row: dict) -> str:
    return str(ConvShape.of(row))


def table(results: list[dict]) -> list[str]:
    return rows.table(results, NAMES, HEADING, label)
