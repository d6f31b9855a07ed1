"""The linear op over packed NF4 weights: values, gradients, what is kept between forward and backward."""

import pytest
import torch
from autograd_cases import (
    as_parameters,
    backward_again_needs_retain_graph,
    opcheck_kept,
    refuses_second_and_forward_derivatives,
    seen_by_hooks,
    with_compiled_autograd,
)
from nf4_cases import DTYPES, Dequantisations, norm_tolerance
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dora_ext import reference
from dora_ext.norm_cache import NormCache
from dora_ext.ops import dequantize_nf4, dora_linear, dora_linear_nf4, norm_and_gain_nf4, quantize_nf4
from dora_ext.testing import TOLERANCE, assert_close, doubles

NAMES = ("x", "lora_A", "lora_B", "magnitude", "bias")


def problem(out=48, n_in=96, r=4, tokens=7, *, dtype=torch.float32, own=torch.float32, device="cpu", zero_rows=()):
    """Adapters in float32; x in `dtype`, W quantised from `own`."""
    weight, lora_B = torch.randn(out, n_in) / n_in**0.5, torch.randn(out, r) / (2 * r**0.5)
    for row in zero_rows:
        weight[row] = lora_B[row] = 0
    q = quantize_nf4(weight.to(device, own), double_quant=not zero_rows)
    tensors = {
        "x": torch.randn(2, tokens, n_in).to(dtype),
        "lora_A": torch.randn(r, n_in) / n_in**0.5,
        "lora_B": lora_B,
        "magnitude": torch.rand(out) + 0.5,
        "bias": torch.randn(out),
    }
    return q, {k: t.to(device).requires_grad_() for k, t in tensors.items()}


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    grads = torch.autograd.grad(y, [tensors[n] for n in NAMES], grad_y)
    return {"y": y, **dict(zip(NAMES, grads, strict=True))}


def truth(q, tensors, scaling, dtype=torch.float32):
    t = doubles(tensors)
    weight = dequantize_nf4(q).to(dtype).double().cpu()
    y = reference.linear(
        t["x"], weight, t["lora_A"], t["lora_B"], t["magnitude"], scaling, t["bias"]
    )  # fmt: skip
    return gradients(y, t)


@pytest.mark.parametrize("own", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_against_the_reference(device, dtype, own):
    q, t = problem(dtype=dtype, own=own, device=device)
    y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)
    assert y.dtype == dtype
    expected = truth(q, t, 1.5)
    # The norm is float32 for every x; x's dtype rounds W where that is wider.
    tolerance = max(TOLERANCE[dtype], norm_tolerance(device, own))
    for name, value in gradients(y, t).items():
        assert_close(value, expected[name], tolerance, name)


def test_equals_the_op_over_the_unpacked_weight(device):
    q, t = problem(device=device)
    rest = [t[n] for n in NAMES[1:]]
    ours = gradients(dora_linear_nf4(t["x"], q, *rest, scaling=1.5), t)
    dense = gradients(dora_linear(t["x"], dequantize_nf4(q), *rest, scaling=1.5), t)
    for name, value in ours.items():
        assert_close(value, dense[name], 1e-6, name)


def test_zero_rows_and_zero_magnitudes():
    q, t = problem(zero_rows=(2, 5))
    with torch.no_grad():
        t["magnitude"][7:9] = 0  # u is not found from y there
    y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)
    assert torch.equal(y[..., [2, 5]], t["bias"][[2, 5]].expand(2, 7, 2))
    ours, expected = gradients(y, t), truth(q, t, 1.5)
    for name in ours:
        assert_close(ours[name], expected[name], 1e-5, name)


@pytest.mark.parametrize("own", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_small_gains_and_parts_of_the_gradients(device, dtype, own):
    """On CUDA g is multiplied into W where W is unpacked, and where the output has lost u it comes from packed rows."""
    q, t = problem(128, 264, 16, 40, dtype=dtype, own=own, device=device)
    with torch.no_grad():
        t["magnitude"][7:9] = 0
        t["magnitude"][20] = 1e-4
    expected = truth(q, t, 1.5, dtype)
    tolerance = max(TOLERANCE[dtype], norm_tolerance(device, own))
    y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)
    for name, value in gradients(y, t).items():
        assert_close(value, expected[name], tolerance, name)
    for name in NAMES:
        t = {n: v.detach().requires_grad_(n == name) for n, v in t.items()}
        y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
        assert_close(torch.autograd.grad(y, t[name], grad_y)[0], expected[name], tolerance, f"{name} alone")


def test_rest_goes_through_the_base_alone(device):
    q, t = problem(device=device)
    rest = torch.randn_like(t["x"]).requires_grad_()
    arguments = [t[n] for n in NAMES[1:]]
    y = dora_linear_nf4(t["x"], q, *arguments, scaling=1.5, rest=rest)
    weight = dequantize_nf4(q)
    expected = dora_linear(t["x"], weight, *arguments, scaling=1.5) + rest @ weight.T
    assert_close(y, expected, 1e-6)
    leaves = [rest, *t.values()]
    for ours, other in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected)), strict=True):
        assert_close(ours, other, 1e-5)


def kept(forward, *inputs: Tensor) -> int:
    """Bytes that autograd keeps, besides the inputs and what they share memory with."""
    known, sizes = {t.untyped_storage().data_ptr() for t in inputs}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    sizes.pop(y.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_keeps_the_packed_weight_only(device):
    q, t = problem(256, 512, 4, 8, device=device)
    forward = lambda: dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.0)  # noqa: E731
    tensors = [v for v in q if isinstance(v, Tensor)]
    assert kept(forward, *t.values(), *tensors) < 16 * 256 * 4 < 256 * 512  # h, norm and gain


@pytest.mark.parametrize("cached", [False, True])
def test_one_dequantisation_in_each_direction(cached):
    q, t = problem()
    cache = NormCache() if cached else None
    with Dequantisations() as forward:
        y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.0, cache=cache, rest=t["x"] * 0.5)
    with Dequantisations() as backward:
        y.sum().backward()
    assert forward.count == backward.count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    q, t = problem()
    cache = NormCache()

    def forward(x):
        return dora_linear_nf4(x, q, *(t[n] for n in NAMES[1:]), scaling=1.5, cache=cache)

    expected = gradients(forward(t["x"]), t)
    ours = {"y": checkpoint(forward, t["x"], use_reentrant=reentrant)}
    ours["y"].backward(torch.randn(ours["y"].shape, generator=torch.Generator().manual_seed(3)))
    ours |= {n: t[n].grad for n in NAMES}
    for name in expected:
        assert torch.equal(ours[name], expected[name])
    assert cache.computed == 1


def test_overwritten_results_and_weights():
    q, t = problem()
    arguments = [t[n] for n in NAMES[1:]]
    # Overwritten, the saved output serves no more, and u is computed again.
    results = []
    for inplace in (False, True):
        y = dora_linear_nf4(t["x"], q, *arguments, scaling=1.5)
        results.append(gradients(torch.nn.functional.relu(y, inplace=inplace), t))
    for name in NAMES:
        assert_close(results[1][name], results[0][name], 1e-5, name)
    for change in (lambda: q.packed.bitwise_xor_(1), lambda: q.absmax.add_(1), lambda: t["lora_B"].detach().mul_(2)):
        y = dora_linear_nf4(t["x"], q, *arguments, scaling=1.5)
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("parameters", [True, False])
def test_saves_no_constants(parameters):
    """Under activation checkpointing each saved tensor costs the host as much as a small launch."""
    q, t = problem()
    t = as_parameters(t) if parameters else t
    saved = seen_by_hooks(lambda: dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5))
    expected = ["x", "h", "y"] + ["packed", "A", "B", "bias"] * (not parameters)
    assert q.nested and len(saved) == len(expected)


def test_compiled_autograd():
    q, t = problem()
    forward = lambda: dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)  # noqa: E731
    for results, expected in with_compiled_autograd(forward, lambda y: gradients(y, t), t["lora_B"]):
        for name in NAMES:
            assert torch.equal(results[name], expected[name]), name


def test_autocast_chooses_the_dtype():
    q, t = problem()
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear_nf4(t["x"], q, *(t[n] for n in NAMES[1:]), scaling=1.5)
    assert y.dtype == torch.bfloat16
    expected = truth(q, t, 1.5)
    for name, value in gradients(y, t).items():
        assert_close(value, expected[name], TOLERANCE[torch.bfloat16] * 1.5, name)


def test_compiles_whole_and_trains():
    q, t = problem()

    def forward(x, *arguments):
        return dora_linear_nf4(x, q, *arguments, scaling=1.5)

    arguments = [t[n] for n in NAMES]
    expected = gradients(forward(*arguments), t)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = gradients(compiled(*arguments), t)
    for name in expected:
        assert_close(results[name], expected[name], 1e-6, name)
    # The graphs keep no dense weight either.
    tensors = [v for v in q if isinstance(v, Tensor)]
    assert kept(lambda: compiled(*arguments), *arguments, *tensors) < 48 * 96 * 4 / 2


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kept", [False, True])
def test_opcheck(device, requires_grad, kept):
    q, t = problem(6, 34, 2, 3, device=device)
    t = {n: v.detach().requires_grad_(requires_grad) for n, v in t.items()}
    rest = torch.randn_like(t["x"]).requires_grad_(requires_grad)
    arguments = (t["x"], *q.operands(), *(t[n] for n in NAMES[1:]), 1.5, rest)
    opcheck_kept(torch.ops.dora_ext.linear_nf4, arguments, 6, device, kept)


@pytest.mark.parametrize("nested", [False, True])
def test_each_gradient_alone(device, nested):
    """Which inputs are there, and which of them ask, is the node's to keep apart."""
    q, t = problem(device=device)
    if not nested:
        q = quantize_nf4(dequantize_nf4(q))
    t["rest"] = torch.randn_like(t["x"]).requires_grad_()
    for without in ("", "bias", "rest"):
        there = {n: None if n == without else v for n, v in t.items()}

        def gradients_of(names, there=there):
            leaves = {n: v if v is None else v.detach().requires_grad_(n in names) for n, v in there.items()}
            y = dora_linear_nf4(leaves["x"], q, *(leaves[n] for n in NAMES[1:]), scaling=1.5, rest=leaves["rest"])
            grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            return dict(zip(names, torch.autograd.grad(y, [leaves[n] for n in names], grad_y), strict=True))

        names = [n for n, v in there.items() if v is not None]
        together = gradients_of(names)
        for name in names:
            assert_close(gradients_of([name])[name], together[name], 1e-6, f"{name} alone, without {without}")


def test_second_and_forward_derivatives_are_refused():
    q, t = problem()
    arguments = [t[n] for n in NAMES[1:]]
    refuses_second_and_forward_derivatives(lambda x: dora_linear_nf4(x, q, *arguments, scaling=1.5), t["x"])


def test_backward_again_needs_retain_graph():
    q, t = problem()
    arguments = [t[n] for n in NAMES[1:]]
    backward_again_needs_retain_graph(dora_linear_nf4(t["x"], q, *arguments, scaling=1.5), [t["x"], *arguments])


@pytest.mark.parametrize("with_rest", [False, True])
def test_opcheck_of_its_parts(with_rest):
    q, t = problem(6, 34, 2, 3)
    ops, adapter = torch.ops.dora_ext, [t[n].detach() for n in NAMES[1:4]]
    x, bias = t["x"].detach(), t["bias"].detach()
    factors = (*adapter, bias, *norm_and_gain_nf4(q, *adapter, scaling=1.5), 1.5)
    forward = (x, *q.operands(), *factors, x * 0.5 if with_rest else None)
    torch.library.opcheck(ops.linear_nf4_forward.default, forward)
    y, h, _ = ops.linear_nf4_forward.default(*forward)
    mask = 63 if with_rest else 31
    torch.library.opcheck(ops.linear_nf4_backward.default, (torch.ones_like(y), y, x, h, *q.operands(), *factors, mask))


def test_refuses_what_does_not_fit():
    q, t = problem()
    arguments = [t[n] for n in NAMES[1:]]
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 96\).*got \[3, 95\]"):
        dora_linear_nf4(torch.randn(3, 95), q, *arguments, scaling=1.0)
    with pytest.raises(TypeError, match="expected bfloat16, float16, float32 or float64"):
        dora_linear_nf4(torch.ones(3, 96, dtype=torch.int64), q, *arguments, scaling=1.0)
    with pytest.raises(ValueError, match="absmax: expected 72 values"):
        dora_linear_nf4(t["x"], q._replace(absmax=q.absmax[1:]), *arguments, scaling=1.0)
    with pytest.raises(ValueError, match=r"linear_nf4_forward: rest: expected shape \[2, 7, 96\], got \[1, 7, 96\]"):
        dora_linear_nf4(t["x"], q, *arguments, scaling=1.0, rest=t["x"][:1])
