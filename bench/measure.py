"""How things are measured; nothing here knows what is measured.

device: replays of a captured CUDA graph, so that no launch gap counts.  wall: eager, launch gaps included, L2 cache
flushed before each call.  Medians everywhere. `touch` runs before each timed call, outside the clock.
"""

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def device_ms(step: Step, repeats: int = 30) -> float:
    """Median time of one replay of `step`, captured as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def wall_ms(step: Step, touch: Step, repeats: int = 30) -> float:
    """Median time from the call to the device's having finished, caches cold."""
    # Larger than any L2: writing it drives everything else out.
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    seconds = []
    for i in range(repeats + 3):
        touch()
        flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= 3:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def peak_mib(step: Step, touch: Step) -> float:
    """Most device memory that one `step` holds beyond what was there before it."""
    step()
    touch()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def interleaved_cpu_ms(steps: dict[str, tuple[Step, Step]], rounds: int = 15) -> dict[str, float]:
    """Median wall time of each (step, touch). Rivals take turns: a slow minute of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds + 2):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            step, touch = steps[name]
            touch()
            start = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def cpu_peak_mib(step: Step, touch: Step) -> float:
    """Most memory that torch's CPU allocator holds during one `step` beyond what was there before it."""
    step()
    touch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    records = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def ceilings(repeats: int = 20) -> dict[str, float]:
    """What this device reaches: a large bf16 product, and a copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = device_ms(lambda: a @ b, repeats)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = device_ms(lambda: target.copy_(source), repeats)
    return {"gemm_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * source.nbytes / copy / 1e9}


def floor_ms(operations: float, moved: float, ceilings: dict[str, float]) -> float:
    """The time for so many operations at the measured rate of a product, or for so many bytes at that of a copy: the
    longer of the two, since they overlap. Other shapes of product can be a little faster than the one measured."""
    return max(operations / ceilings["gemm_tflops"], moved / ceilings["copy_tb_s"]) / 1e9


def failure(error: Exception) -> dict[str, str]:
    """One rival's failure is a result of its own."""
    return {"error": f"{type(error).__name__}: {error}"[:500]}
