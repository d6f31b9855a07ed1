"""Measurements over a training run: kept, drawn, written to a file."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from torch import nn

from .measure import LayerAnalysis, Spread, analyse, by_kind


class MagnitudeHistory:
    """`analyse` of one model at several steps.

    history = MagnitudeHistory()
    for step in ...:
        loss.backward()
        history.record(model, step)  # before zero_grad, so that magnitudes have gradients
    history.plot("magnitudes.png")

    Attributes:
        steps: in rising order. layers: for each step, every layer's LayerAnalysis by its path.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.layers: list[dict[str, LayerAnalysis]] = []

    def record(self, model: nn.Module, step: int, adapter: str | None = None) -> dict[str, LayerAnalysis]:
        """Measure now. What was recorded for this step or later ones is dropped first: a run that is resumed writes
        over what it repeats. Arguments, result and errors as in `analyse`."""
        layers = analyse(model, adapter)
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.layers.pop()
        self.steps.append(step)
        self.layers.append(layers)
        return layers

    def curve(self, name: str, number: str) -> list[float | None]:
        """One number of one layer at every step: curve("model.layers.0.mlp.up_proj", "magnitude/mean"). The numbers
        are those of LayerAnalysis.scalars; None where there was none. KeyError: no such layer."""
        return [layers[name].scalars().get(number) for layers in self.layers]

    def figure(self):
        """A matplotlib Figure with four curves over the steps for each kind of layer: magnitude and direction change,
        m / n and the magnitude's gradient. Raises ValueError if nothing was recorded, ImportError without matplotlib.
        """
        if not self.steps:
            raise ValueError("MagnitudeHistory.figure: nothing was recorded yet: call record(model, step) first")
        from matplotlib.figure import Figure  # not pyplot: its state belongs to whoever else is drawing

        groups = [by_kind(layers) for layers in self.layers]
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flat
        numbers = ("magnitude_change", "direction_change", "ratio/mean", "magnitude_grad_norm")
        labels = ("ΔM, mean |m − |W||", "ΔD, mean 1 − cos(W + sBA, W)", "mean m / n", "|gradient of m|")
        for panel, number, label in zip(panels, numbers, labels, strict=True):
            for kind in groups[-1]:
                values = [group[kind].scalars().get(number, float("nan")) for group in groups if kind in group]
                steps = [step for step, group in zip(self.steps, groups, strict=True) if kind in group]
                panel.plot(steps, values, marker="." if len(steps) < 50 else "", label=kind)
            panel.set(title=label, xlabel="step")
            panel.grid(alpha=0.3)
        handles, kinds = panel.get_legend_handles_labels()
        figure.legend(handles, kinds, loc="outside lower center", ncols=min(len(kinds), 7))
        return figure

    def plot(self, path: str | os.PathLike) -> None:
        """`figure` as a PNG file."""
        self.figure().savefig(path, dpi=120, format="png")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything to a file for `from_json`."""
        entries = [
            {"step": step, "layers": {name: asdict(layer) for name, layer in layers.items()}}
            for step, layers in zip(self.steps, self.layers, strict=True)
        ]
        Path(path).write_text(json.dumps(entries) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "MagnitudeHistory":
        """Read what `to_json` wrote. ValueError: the file holds something else."""
        self = cls()
        try:
            for entry in json.loads(Path(path).read_text(encoding="utf-8")):
                self.steps.append(int(entry["step"]))
                self.layers.append({name: _layer(values) for name, values in entry["layers"].items()})
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"MagnitudeHistory.from_json: {path}: not written by to_json: {error!r}") from error
        return self


def _layer(values: dict) -> LayerAnalysis:
    return LayerAnalysis(**{k: Spread(**v) if isinstance(v, dict) else v for k, v in values.items()})
