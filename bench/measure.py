"""How things are measured; nothing here knows what is measured.

device: replays of a captured CUDA graph, so that no launch gap counts.  wall: eager, launch gaps included, L2 cache
flushed before each call.  Medians everywhere. `touch` runs before each timed call, outside the clock.
"""

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def captured(step: Step) -> Step:
    """The replay of `step` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept: Step = step) -> None:  # what the graph reads lives as long as it
        graph.replay()

    return replay


def device_ms(replays: dict[str, Step], repeats: int = 30) -> dict[str, float]:
    """Median time of one replay of each. Rivals take turns of a few replays, the first of them not timed: a GPU's clock
    follows the power drawn, and must be the same for all."""
    turn = 3
    events: dict[str, list] = {name: [] for name in replays}
    for i in range(1 + repeats // turn):
        for name in _rotated(replays, i):
            replays[name]()
            for _ in range(turn):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                replays[name]()
                end.record()
                if i:
                    events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}


def device_ms_of(step: Step, repeats: int = 30) -> float:
    return device_ms({"": captured(step)}, repeats)[""]


def wall_ms(steps: dict[str, tuple[Step, Step]], repeats: int = 30) -> dict[str, float]:
    """Median time of each (step, touch) from the call to the end of the device's work, caches cold. They take turns."""
    # Larger than any L2: writing it drives everything else out.
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    return _in_turns(steps, repeats, flush.zero_, torch.cuda.synchronize)


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


def cpu_ms(steps: dict[str, tuple[Step, Step]], repeats: int = 15) -> dict[str, float]:
    """Median wall time of each (step, touch) on the CPU. Rivals take turns."""
    return _in_turns(steps, repeats, lambda: None, lambda: None)


def _in_turns(steps: dict[str, tuple[Step, Step]], repeats: int, flush: Step, wait: Step) -> dict[str, float]:
    """A slow minute of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name in _rotated(steps, i):
            step, touch = steps[name]
            touch()
            flush()
            wait()
            start = time.perf_counter()
            step()
            wait()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def _rotated(steps: dict, i: int) -> list[str]:
    names = list(steps)
    return names[i % len(names) :] + names[: i % len(names)] if names else []


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
    product = device_ms_of(lambda: a @ b, repeats)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = device_ms_of(lambda: target.copy_(source), repeats)
    return {"gemm_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * source.nbytes / copy / 1e9}


def floor_ms(operations: float, moved: float, ceilings: dict[str, float]) -> float:
    """The time for so many operations at the measured rate of a product, or for so many bytes at that of a copy: the
    longer of the two, since they overlap. Other shapes of product can be a little faster than the one measured."""
    return max(operations / ceilings["gemm_tflops"], moved / ceilings["copy_tb_s"]) / 1e9


def failure(error: Exception) -> dict[str, str]:
    """One rival's failure is a result of its own."""
    return {"error": f"{type(error).__name__}: {error}"[:500]}
