"""A training step of one linear layer: forward, and the gradients of x, A, B and m. The factors are touched before each
call, so that a kept norm is stale, as after an optimizer step."""

import gc
from collections.abc import Callable

import torch

from .measure import cpu_peak_mib, device_ms, interleaved_cpu_ms, peak_mib, wall_ms
from .rivals import NAMES, OURS, Problem, Rival, Shape, build

KEY = "linear_step"
TITLE = "Training step of one linear layer"

CUDA_SHAPES = [
    Shape(4096, 4096, 4096, 16),
    Shape(4096, 4096, 4096, 384),
    Shape(4096, 4096, 14336, 16),
    Shape(4096, 4096, 14336, 384),
    Shape(4096, 14336, 4096, 16),
    Shape(4096, 4096, 1024, 16),
    Shape(16384, 4096, 4096, 16),
]
# Compiling takes longer than all the rest, so it is done where it says most.
COMPILED_SHAPES = {Shape(4096, 4096, 4096, 16), Shape(4096, 4096, 14336, 16)}
CPU_SHAPES = [
    Shape(512, 2048, 2048, 16),
    Shape(128, 2048, 2048, 16),
    Shape(2048, 1024, 1024, 16),
    Shape(512, 2048, 2048, 64),
    Shape(512, 576, 1536, 8),
]


def run(device: str, quick: bool, note) -> list[dict]:
    rows = []
    for shape in (CUDA_SHAPES if device == "cuda" else CPU_SHAPES)[: 2 if quick else None]:
        note(f"{KEY}: {shape}")
        names = [n for n in NAMES if n != "peft_dora_compiled" or (device == "cuda" and shape in COMPILED_SHAPES)]
        if quick:
            names = [n for n in names if n != "peft_dora_compiled"]
        measure = on_cuda if device == "cuda" else on_cpu
        rows.append(vars(shape) | {"rivals": measure(shape, names, quick)})
    return rows


def _error(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def on_cuda(shape: Shape, names: list[str], quick: bool, make: Callable | None = None) -> dict[str, dict]:
    """bf16 throughout, no bias. One rival at a time: the others' memory is not its own."""
    problem = Problem.random(shape, "cuda", torch.bfloat16, bias=False)
    repeats = 8 if quick else 30
    results = {}
    for name in names:
        result = results[name] = {}
        try:
            rival = (make or build)(name, problem)
            result["wall_ms"] = wall_ms(rival.step, rival.touch, repeats)
            result["peak_mib"] = peak_mib(rival.step, rival.touch)
            result["device_ms"] = device_ms(rival.step, repeats)
        except Exception as error:  # one rival's failure is a result of its own
            result |= _error(error)
        rival = None
        gc.collect()
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    return results


def on_cpu(shape: Shape, names: list[str], quick: bool, make: Callable | None = None) -> dict[str, dict]:
    """fp32, with bias."""
    problem = Problem.random(shape, "cpu", torch.float32, bias=True)
    results: dict[str, dict] = {}
    rivals: dict[str, Rival] = {}
    for name in names:
        try:
            rivals[name] = (make or build)(name, problem)
            results[name] = {"peak_mib": cpu_peak_mib(rivals[name].step, rivals[name].touch)}
        except Exception as error:
            rivals.pop(name, None)
            results[name] = _error(error)
    times = interleaved_cpu_ms({n: (r.step, r.touch) for n, r in rivals.items()}, rounds=5 if quick else 21)
    for name, ms in times.items():
        results[name]["wall_ms"] = ms
    return results


def table(rows: list[dict], captions_of: dict[str, str] = NAMES) -> list[str]:
    """Markdown: a column for each rival, a cell for what it took."""
    names = [n for n in captions_of if any(n in row["rivals"] for row in rows)]
    captions = {"device_ms": "device ms", "wall_ms": "wall ms", "peak_mib": "peak MiB"}
    measures = [m for m in captions if any(m in r for row in rows for r in row["rivals"].values())]
    lines = [
        f"Each cell: {' / '.join(captions[m] for m in measures)}.",
        "",
        "| tokens, in → out, r | "
        + " | ".join(f"**{captions_of[n]}**" if n.startswith(OURS) else captions_of[n] for n in names)
        + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        shape = Shape(row["tokens"], row["in_features"], row["out_features"], row["r"])
        lines.append(f"| {shape} | " + " | ".join(_cell(row["rivals"].get(n), measures) for n in names) + " |")
    return lines


def _cell(result: dict | None, measures: list[str]) -> str:
    if result is None:
        return ""
    if "error" in result:
        return "failed"
    formats = {"device_ms": "{:.3f}", "wall_ms": "{:.2f}", "peak_mib": "{:.0f}"}
    return " / ".join(formats[m].format(result[m]) for m in measures if m in result)
