"""transformers' Trainer: a callback that records what DoRA does while it trains."""

import os
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..analysis import MagnitudeHistory, by_kind


class DoraCallback(TrainerCallback):
    """Records `dora_ext.analysis` of the model when training begins and after every `every`-th step.

    callback = DoraCallback(every=100)
    trainer = Trainer(..., callbacks=[callback])
    trainer.train()
    callback.history.plot("magnitudes.png")

    Each record's numbers go, as means over the layers of a kind ("dora/q_proj/direction_change"), to

        log: a function of a dict, such as trainer.log (trainer.add_callback(DoraCallback(log=trainer.log))): it reaches
            whatever the Trainer reports to, and state.log_history;
        writer: a torch.utils.tensorboard.SummaryWriter, which stays open;
        a SummaryWriter of its own where neither is given and the Trainer reports to TensorBoard: a run beside the
            Trainer's own, named with "dora" at its end.

    Without any of them, and without TensorBoard installed, they are kept in `history`.

    Args:
        every: number of optimizer steps.
        history: to go on with, e.g. MagnitudeHistory.from_json(...) of the run that is being resumed.
        adapter: as in `analyse`.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        history: MagnitudeHistory | None = None,
        log: Callable[[dict[str, float]], Any] | None = None,
        writer: Any = None,
        adapter: str | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"DoraCallback: every: expected a whole number of steps, at least 1, got {every!r}")
        self.every, self.log, self.writer, self.adapter = every, log, writer, adapter
        self.history = MagnitudeHistory() if history is None else history
        self._own_writer = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if not (self.log or self.writer) and state.is_world_process_zero and "tensorboard" in args.report_to:
            self._own_writer = _summary_writer(args)
        # A run that is resumed has this step's record already, with gradients, if its history came along.
        if state.global_step == 0 or state.global_step not in self.history.steps:
            self.history.record(model, state.global_step, self.adapter)
            self._publish(state)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        # The weights are this step's already, and the gradients are still there; only the step is not yet counted. All
        # processes measure: where parameters are partitioned, they are gathered together.
        step = state.global_step + 1
        if step % self.every == 0:
            self.history.record(model, step, self.adapter)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self._publish(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._own_writer is not None:
            self._own_writer.close()
            self._own_writer = None

    def _publish(self, state) -> None:
        if not state.is_world_process_zero:
            return
        kinds = by_kind(self.history.layers[-1])
        scalars = {f"dora/{kind}/{name}": x for kind, a in kinds.items() for name, x in a.scalars().items()}
        if self.log:
            self.log(scalars)
        writer = self.writer or self._own_writer
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, state.global_step)


def _summary_writer(args) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    folder = os.getenv("TENSORBOARD_LOGGING_DIR") or f"{args.output_dir}/runs/{time.strftime('%b%d_%H-%M-%S')}"
    return SummaryWriter(os.path.expanduser(folder) + "-dora")
