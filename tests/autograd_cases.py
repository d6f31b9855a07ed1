"""What the tests of autograd nodes share."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

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


def as_parameters(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """A problem in which all but x are a module's own."""
    return {k: v if k == "x" else Parameter(v.detach(), requires_grad=k != "weight") for k, v in t.items()}


def seen_by_hooks(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """The shapes of the tensors that go through hooks on saved tensors."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        call()
    return shapes


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


def opcheck_kept(op, arguments: tuple, out: int, device: str, kept: bool) -> None:
    """torch.library.opcheck of an op whose last arguments are what a norm is kept in: given where `kept`."""
    # Tracing makes an op that writes into what it is given functional; nobody traces a cache (NormCache.usable).
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if kept:
        arguments += (torch.empty(out, device=device), torch.zeros(4, dtype=torch.int64, device=device), 3)
    else:
        tests += ["test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments, test_utils=tests)


def constants_get_no_gradient(layer: Callable[..., Tensor], problem: Callable[[], dict[str, Tensor]], out: int) -> None:
    """Of layer(**problem(), norm, gain): the weight, nor a norm and a gain that are given."""
    t = problem()
    t["weight"].requires_grad_()
    norm, gain = (torch.rand(out, requires_grad=True) for _ in range(2))
    layer(**t, norm=norm, gain=gain).sum().backward()
    assert t["x"].grad is not None and t["magnitude"].grad is not None
    assert t["weight"].grad is None and norm.grad is None and gain.grad is None


def makes_no_graph_without_need(layer: Callable[..., Tensor], problem: Callable[..., dict[str, Tensor]]) -> None:
    assert layer(**problem(requires_grad=False)).grad_fn is None
    with torch.no_grad():
        assert layer(**problem()).grad_fn is None
