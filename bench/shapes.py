"""What is measured: layers, their sizes, and the input that they get."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import nn


class Shape:
    """Of a layer, its input and its adapter of rank r. `heading` tells what str() lists."""

    heading: ClassVar[str]
    r: int

    @classmethod
    def of(cls, row: dict):
        """The shape that a row of results was measured at."""
        return cls(**{f.name: row[f.name] for f in fields(cls)})

    def layer(self, bias: bool) -> nn.Module:
        """On the meta device."""
        raise NotImplementedError

    def input_size(self) -> tuple[int, ...]:
        raise NotImplementedError


@dataclass(frozen=True)
class LinearShape(Shape):
    tokens: int
    in_features: int
    out_features: int
    r: int
    heading = "tokens, in → out, r"

    def __str__(self) -> str:
        return f"{self.tokens}, {self.in_features} → {self.out_features}, {self.r}"

    def layer(self, bias: bool) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias, device="meta")

    def input_size(self) -> tuple[int, ...]:
        return self.tokens, self.in_features


@dataclass(frozen=True)
class ConvShape(Shape):
    """In as many dimensions as `size` has; stride 1, padded to keep its size."""

    batch: int
    in_channels: int
    out_channels: int
    kernel: int
    size: tuple[int, ...]
    r: int
    heading = "batch, in → out, kernel, size, r"

    def __str__(self) -> str:
        kernel, size = ("×".join(map(str, n)) for n in ([self.kernel] * len(self.size), self.size))
        return f"{self.batch}, {self.in_channels} → {self.out_channels}, {kernel}, {size}, {self.r}"

    def layer(self, bias: bool) -> nn.Module:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.size) - 1]
        options = {"padding": self.kernel // 2, "bias": bias, "device": "meta"}
        return kind(self.in_channels, self.out_channels, self.kernel, **options)

    def input_size(self) -> tuple[int, ...]:
        return self.batch, self.in_channels, *self.size

    @property
    def positions(self) -> int:
        """Of the output, in all images together."""
        return self.batch * math.prod(self.size)


@dataclass(frozen=True)
class EmbeddingShape(Shape):
    tokens: int
    vocab: int
    dim: int
    r: int
    heading = "tokens, vocab × dim, r"

    def __str__(self) -> str:
        return f"{self.tokens}, {self.vocab} × {self.dim}, {self.r}"

    def layer(self, bias: bool) -> nn.Embedding:
        """An embedding has no bias, whatever is asked for."""
        return nn.Embedding(self.vocab, self.dim, device="meta")

    def input_size(self) -> tuple[int, ...]:
        return (self.tokens,)
