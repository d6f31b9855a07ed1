"""What the tests of autograd nodes share."""

from collections.abc import Callable, Iterator

import torch
import torch._dynamo.compiled_autograd
from torch import Tensor

Gradients = dict[str, Tensor]


def with_compiled_autograd(
    forward: Callable[[], Tensor], gradients: Callable[[Tensor], Gradients], lora_B: Tensor
) -> Iterator[tuple[Gradients, Gradients]]:
    """Of a forward that was not compiled, the gradients of a backward that is compiled, and of one that is not: twice,
    since the node's constants are not those of the first time."""
    for _ in range(2):
        with torch.no_grad():
            lora_B.normal_()
        expected = gradients(forward())
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            results = gradients(forward())
        yield results, expected
