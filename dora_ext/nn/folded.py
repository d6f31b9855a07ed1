"""A layer whose adapter is folded into its weight because no DoRA layer here can train it."""

from torch import Tensor, nn


class FoldedLayer(nn.Module):
    """Computes what `folded`, a plain frozen layer of the base layer's type, computes; `base_layer` is kept aside.

    `load_kohya` puts it where a file has a magnitude for each input column. dora_ext.unload takes it out again.
    """

    def __init__(self, base_layer: nn.Module, folded: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.folded = base_layer, folded.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.folded.weight

    @property
    def bias(self) -> Tensor | None:
        return self.folded.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(x)
