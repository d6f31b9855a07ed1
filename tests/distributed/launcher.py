"""Processes that wait for scenarios to run together, so that a test costs no start of Python.

A rank that fails, dies or takes too long ends them all: the test shows every rank's traceback, and the next test gets
new ranks. Nothing hangs: the process group has a timeout, and the test waits only a little longer.
"""

import importlib
import multiprocessing
import os
import resource
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch


class RanksFailed(AssertionError):
    """Some rank raised, died or did not answer in time."""


@dataclass(frozen=True)
class Rank:
    """What a scenario knows about where it runs."""

    rank: int
    world: int
    device: torch.device


class Ranks:
    """`world` processes on "cpu" (gloo) or "cuda" (NCCL, a GPU each); `timeout` in seconds is the process group's."""

    def __init__(self, world: int, device: str, folder: Path, timeout: float = 60) -> None:
        self.world, self.device, self.folder, self.timeout = world, device, folder, timeout
        self._processes: list = []
        self._pipes: list = []
        self._starts = 0

    def start(self) -> None:
        # A file each time: ranks that were killed leave it behind.
        meeting = self.folder / f"meeting-{self._starts}"
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, self.device, str(meeting), self.timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, scenario: str, **options) -> list:
        """Each rank's result of a scenario, "module.function" of this folder. RanksFailed tells what they said."""
        answers = self.answers(scenario, **options)
        failed = [f"rank {rank}: {text}" for rank, (kind, text) in enumerate(answers) if kind != "result"]
        if failed:
            self.stop()
            raise RanksFailed(f"{scenario}({options}) failed:\n" + "\n".join(failed))
        return [result for _, result in answers]

    def answers(self, scenario: str, **options) -> list[tuple[str, object]]:
        """From each rank ("result", value), ("raised", traceback), ("died", exit code) or ("silent", seconds)."""
        if not self._processes:
            self.start()
        for pipe in self._pipes:
            pipe.send((scenario, options))
        deadline = time.monotonic() + self.timeout + 30  # importing torch in all ranks is part of it
        failed = False
        answers: list = [None] * self.world
        while None in answers and time.monotonic() < deadline:
            for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
                if answers[rank] is None and pipe.poll(0.02):
                    try:
                        answers[rank] = pipe.recv()
                    except (EOFError, OSError):
                        process.join(5)
                        answers[rank] = ("died", process.exitcode)
            if not failed and any(a and a[0] != "result" for a in answers):
                failed = True
                # The others are waiting for one that will not come: they have until the process group's timeout. NCCL's
                # watchdog then tries to write down what was going on, before it ends the process.
                deadline = time.monotonic() + self.timeout + (60 if self.device == "cuda" else 5)
        return [a or ("silent", f"no answer within {self.timeout + 30} s") for a in answers]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join(20)  # it may be stuck in the GPU's driver
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, device: str, meeting: str, timeout: float, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # NCCL's watchdog ends a process by SIGABRT: no files of gigabytes
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    # Under FSDP2 the watchdog itself gets stuck behind a collective whose other rank is gone; torch gives it 8 minutes.
    os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = str(round(timeout))
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
        torch.backends.cudnn.allow_tf32 = False  # as in the tests' own process
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    while True:
        try:
            name, options = pipe.recv()
        except EOFError:  # the test is over
            return
        try:
            torch.manual_seed(0)
            module, _, function = name.partition(".")
            scenario = getattr(importlib.import_module(f"distributed.{module}"), function)
            answer = ("result", scenario(Rank(rank, world, here), **options))
        except Exception:
            answer = ("raised", traceback.format_exc())
        pipe.send(answer)
