"""Errors of one linear layer against the same mathematics in float64: |out - ref| / |ref|."""

import torch

from dora_ext import reference

from .measure import failure
from .rivals import ADAPTED, OURS, Problem, build
from .shapes import LinearShape

KEY = "errors"
TITLE = "Error against float64"
SHAPE = LinearShape(512, 4096, 4096, 64)
NAMES = {name: ADAPTED[name] for name in ("peft_dora", OURS)}
OUTPUTS = ("y", "dX", "dA", "dB", "dm")


def run(device: str, quick: bool, note) -> list[dict]:
    shape = LinearShape(128, 512, 512, 16) if quick else SHAPE
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if device == "cpu" and dtype == torch.float16:
            continue
        name = str(dtype).removeprefix("torch.")
        note(f"{KEY}: {shape}, {name}")
        problem = Problem.random(shape, device, dtype, bias=False)
        results = {}
        for rival_name in NAMES:
            try:
                results[rival_name] = errors_of(rival_name, problem)
            except Exception as error:
                results[rival_name] = failure(error)
        rows.append(vars(shape) | {"dtype": name, "rivals": results})
    return rows


def errors_of(name: str, problem: Problem) -> dict[str, float]:
    """By output, for the rival of that name in `bench.rivals`."""
    rival = build(name, problem)
    kinds = ("lora_A", "lora_B", "lora_magnitude")
    by_kind = {kind: p for kind in kinds for name, p in rival.trained.items() if kind in name}
    y = rival.forward(rival.x)
    got = torch.autograd.grad(y, (rival.x, *by_kind.values()), rival.grad_y)

    # The same numbers, widened: what is left is the rival's own rounding.
    x, *parameters = (p.detach().double().requires_grad_() for p in (rival.x, *by_kind.values()))
    lora_A, lora_B, magnitude = parameters
    bias = None if problem.bias is None else problem.bias.double()
    exact = reference.linear(x, problem.weight.double(), lora_A, lora_B, magnitude, problem.scaling, bias)
    truth = torch.autograd.grad(exact, (x, *parameters), problem.grad_y.double())
    pairs = zip(OUTPUTS, (y, *got), (exact, *truth), strict=True)
    return {output: ((a.double() - b).norm() / b.norm()).item() for output, a, b in pairs}


def table(rows: list[dict]) -> list[str]:
    """Markdown: a row for each dtype and rival."""
    lines = [f"| {LinearShape.heading} | dtype | | " + " | ".join(OUTPUTS) + " |", "|---" * (len(OUTPUTS) + 3) + "|"]
    for row in rows:
        shape = LinearShape.of(row)
        for name, result in row["rivals"].items():
            cells = ["failed"] * len(OUTPUTS) if "error" in result else [f"{result[o]:.2e}" for o in OUTPUTS]
            lines.append(f"| {shape} | {row['dtype']} | {NAMES[name]} | " + " | ".join(cells) + " |")
    return lines
