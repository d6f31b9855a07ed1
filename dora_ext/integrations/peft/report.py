"""What `enable()` does for a given model, layer by layer."""

from collections import Counter

from torch import nn

from .paths import DELTA, PEFT, Path, active_adapters, path_of
from .switch import is_enabled


class Report(dict[str, Path]):
    """Module name -> Path; `print` shows a table."""

    def __str__(self) -> str:
        if not self:
            return "no DoRA layers"
        counts = Counter(path.path for path in self.values())
        rows = [("layer", "path", "why"), *((name, path.path, path.reason) for name, path in self.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:<{widths[0]}}  {path:<{widths[1]}}  {why}".rstrip() for name, path, why in rows]
        return "\n".join([*lines, ", ".join(f"{n} {path}" for path, n in counts.items())])


def report(model: nn.Module) -> Report:
    """For each layer of a PEFT model that has a DoRA adapter, by its name: the path that its next forward takes, and
    why ("fused": one call of ours; "delta": PEFT's base product and our DoRA layer; "peft": PEFT's own code).

    The answer is for a forward with the layer's input as its only argument, in the model's present mode.
    """
    return Report((name, _path(module)) for name, module in model.named_modules() if _has_dora(module))


def _has_dora(module: nn.Module) -> bool:
    vectors = module._modules.get("lora_magnitude_vector")
    return bool(vectors) and hasattr(module, "lora_variant")


def _path(layer: nn.Module) -> Path:
    if not is_enabled():
        return Path(PEFT, "enable() is not in force")
    if "forward" in vars(layer):
        return Path(DELTA, "the layer's forward has been replaced")
    if not hasattr(type(layer).forward, "switched"):
        return Path(DELTA, f"PEFT's {type(layer).__name__} does its own base product")
    return path_of(layer, active_adapters(layer))
