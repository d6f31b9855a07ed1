"""PEFT's DoRA on our kernels, with one line:

    import dora_ext.integrations.peft as d

    d.enable()               # before or after the model is made; PEFT 0.18 to 0.21
    print(d.report(model))   # which layers take which path, and why

From then on `LoraConfig(use_dora=True)`, training, merging, saving and loading give PEFT's results, files and errors;
`d.disable()` goes back, `with d.enabled():` does both. A layer with one active, unmerged DoRA adapter is a single call
of ours (path "fused"); several adapters, hooks, wrapped weights and the like keep PEFT's base product and add what our
layer gives (path "delta"); layers where nothing of DoRA is to be computed stay PEFT's (path "peft").

Norms are reused while nothing changed, see dora_ext.norm_cache; `dora_ext.invalidate_norms(model)` forgets them.
"""

from .paths import Path
from .report import Report, report
from .switch import disable, enable, enabled, is_enabled

__all__ = ["Path", "Report", "disable", "enable", "enabled", "is_enabled", "report"]
