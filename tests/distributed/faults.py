"""A rank that is killed at the worst moment."""

import os
import signal
from pathlib import Path

from dora_ext import save_adapter

from .launcher import Rank
from .states import some_steps, start


def killed(rank: Rank, folder: Path, engine: str, during: str) -> None:
    """One step, a save; then a rank is killed in the backward pass of the next, or rank 0 in the next save, when the
    new file is written but not yet in its place."""
    trainer = start(rank, engine)
    some_steps(trainer, 0, 1)
    save_adapter(trainer.model, folder)
    if during == "backward" and rank.rank == 1:
        model = getattr(trainer.model, "module", trainer.model)
        model.blocks[0].register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    some_steps(trainer, 1, 1)
    if rank.rank == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_adapter(trainer.model, folder)
