"""What the tests of autograd nodes share."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor
from torch.autograd import forward_ad

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


def refuses_second_and_forward_derivatives(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """call(x) is a layer's output."""
    x = x.detach().requires_grad_()
    y = call(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def backward_again_needs_retain_graph(y: Tensor, leaves: list[Tensor]) -> None:
    grad_y = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, grad_y, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    y.backward(grad_y)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(grad_y)
