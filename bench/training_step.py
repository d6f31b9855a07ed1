"""A training step of one layer: forward, and the gradients of x (unless x is ids), A, B and m. The factors are touched
before each call, so that a kept norm is stale, as after an optimizer step."""

import gc
from collections.abc import Callable

import torch

from . import rivals
from .measure import captured, cpu_ms, cpu_peak_mib, device_ms, failure, peak_mib, wall_ms
from .rivals import Problem, Rival
from .shapes import Shape

Build = Callable[[str, Problem], Rival]


def on_cuda(shape: Shape, names: list[str], quick: bool, build: Build | None = None) -> dict[str, dict]:
    """bf16 throughout, no bias."""
    problem = Problem.random(shape, "cuda", torch.bfloat16, bias=False)
    repeats = 8 if quick else 30
    results: dict[str, dict] = {}
    ready: dict[str, Rival] = {}
    replays: dict[str, Callable] = {}
    for name in names:
        try:
            rival = (build or rivals.build)(name, problem)
            results[name] = {"peak_mib": peak_mib(rival.step, rival.touch)}
            ready[name] = rival
            # Last: what cannot be captured keeps what was measured until then.
            replays[name] = captured(rival.step)
        except Exception as error:
            results[name] = results.get(name, {}) | failure(error)
        rival = None
        gc.collect()
        torch.cuda.empty_cache()
    for name, ms in wall_ms({n: (r.step, r.touch) for n, r in ready.items()}, repeats).items():
        results[name]["wall_ms"] = ms
    for name, ms in device_ms(replays, repeats).items():
        results[name]["device_ms"] = ms
    torch._dynamo.reset()
    return results


def on_cpu(shape: Shape, names: list[str], quick: bool, build: Build | None = None) -> dict[str, dict]:
    """fp32, with bias."""
    problem = Problem.random(shape, "cpu", torch.float32, bias=True)
    results: dict[str, dict] = {}
    ready: dict[str, Rival] = {}
    for name in names:
        try:
            ready[name] = (build or rivals.build)(name, problem)
            results[name] = {"peak_mib": cpu_peak_mib(ready[name].step, ready[name].touch)}
        except Exception as error:
            ready.pop(name, None)
            results[name] = failure(error)
    times = cpu_ms({n: (r.step, r.touch) for n, r in ready.items()}, 5 if quick else 21)
    for name, ms in times.items():
        results[name]["wall_ms"] = ms
    return results


ON = {"cuda": on_cuda, "cpu": on_cpu}
