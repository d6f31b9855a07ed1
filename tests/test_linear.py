"""dora_linear: the autograd node around linear_forward and linear_backward; tests/test_linear_op.py has these two."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dora_ext import reference
from dora_ext.ops import dora_linear, norm_and_gain
from dora_ext.testing import DEVICES, DTYPES, TOLERANCE, adapter, assert_close, doubles

GRADIENTS = ["x", "lora_A", "lora_B", "magnitude", "bias"]


def run(fn, tensors, grad_y, frozen=()):
    tensors = {k: t.detach().requires_grad_(t.requires_grad and k not in frozen) for k, t in tensors.items()}
    y = fn(**tensors)
    y.backward(grad_y)
    return y, {k: t.grad for k, t in tensors.items()}


def inputs(tokens, out, inn, r, **options):
    t = adapter(out, inn, r, **options)
    x = torch.randn(*tokens, inn, dtype=torch.float64)
    t["x"] = x.to(t["weight"].dtype).to(t["weight"].device).requires_grad_()
    grad_y = torch.randn(*tokens, out, dtype=torch.float64).to(t["x"].dtype).to(t["x"].device)
    return t, grad_y


@pytest.fixture(params=["eager", "compiled"])
def apply(request):
    if request.param == "eager":
        return dora_linear
    torch._dynamo.reset()
    return torch.compile(dora_linear, fullgraph=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_match_the_reference(apply, device, dtype, transposed):
    t, grad_y = inputs((5, 13), 40, 72, 8, dtype=dtype, device=device, transposed=transposed, zero_rows=(2,))
    y, grads = run(lambda **k: apply(**k, scaling=2.0, transposed=transposed), t, grad_y)
    ref_y, ref_grads = run(
        lambda **k: reference.linear(**k, scaling=2.0, transposed=transposed), doubles(t), grad_y.double().cpu()
    )
    assert_close(y, ref_y, TOLERANCE[dtype], "y")
    for name in GRADIENTS:
        assert grads[name].dtype == t[name].dtype
        assert_close(grads[name], ref_grads[name], TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_wider_than_x(device, dtype):
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    t, grad_y = inputs((33,), 24, 56, 8, dtype=dtype, device=device, param_dtype=wide)
    y, grads = run(lambda **k: dora_linear(**k, scaling=0.5), t, grad_y)
    ref_y, ref_grads = run(lambda **k: reference.linear(**k, scaling=0.5), doubles(t), grad_y.double().cpu())
    assert y.dtype == dtype
    assert_close(y, ref_y, TOLERANCE[dtype], "y")
    for name in GRADIENTS:
        assert grads[name].dtype == t[name].dtype
        assert_close(grads[name], ref_grads[name], TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "wanted", [{"x"}, {"lora_A"}, {"lora_B"}, {"magnitude"}, {"bias"}, {"x", "magnitude"}, {"lora_A", "lora_B"}]
)
def test_only_what_is_asked_for(device, wanted):
    t, grad_y = inputs((9,), 24, 16, 4, dtype=torch.float32, device=device)
    frozen = set(GRADIENTS) - wanted
    _, grads = run(lambda **k: dora_linear(**k, scaling=0.5), t, grad_y, frozen)
    _, ref_grads = run(lambda **k: reference.linear(**k, scaling=0.5), doubles(t), grad_y.double().cpu())
    for name in GRADIENTS:
        if name in wanted:
            assert_close(grads[name], ref_grads[name], 1e-5, name)
        else:
            assert grads[name] is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(device, transposed):
    t, _ = inputs((3, 2), 5, 4, 2, device=device, transposed=transposed)
    # The norm is a constant of the backward pass, so a finite difference must hold it still too.
    norm, _ = norm_and_gain(t["weight"], t["lora_A"], t["lora_B"], t["magnitude"], scaling=0.5, transposed=transposed)

    def fn(x, a, b, m, bias):
        return dora_linear(
            x, t["weight"], a, b, m, bias, scaling=0.5, transposed=transposed, norm=norm, gain=(m / norm).detach()
        )

    assert torch.autograd.gradcheck(fn, tuple(t[k] for k in GRADIENTS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_magnitudes_of_zero_and_nearly_zero_keep_their_gradient(device, bias):
    """Where g = 0 the output holds nothing of u, and where g is tiny it lost u's bits to the bias."""
    t, grad_y = inputs((64,), 16, 32, 4, dtype=torch.float32, device=device, bias=bias)
    with torch.no_grad():
        t["magnitude"][3], t["magnitude"][7], t["magnitude"][11] = 0.0, 1e-6, -1e-3
    _, grads = run(lambda **k: dora_linear(**k, scaling=1.0), t, grad_y)
    _, ref_grads = run(lambda **k: reference.linear(**k, scaling=1.0), doubles(t), grad_y.double().cpu())
    assert (grads["magnitude"].cpu() - ref_grads["magnitude"]).abs().max() < 1e-4 * ref_grads["magnitude"].abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_output_may_be_overwritten_in_place(device):
    t, _ = inputs((12,), 16, 24, 4, dtype=torch.float32, device=device)
    results = []
    for activation in (torch.relu, torch.relu_):
        leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in t.items()}
        activation(dora_linear(**leaves, scaling=1.0)).square().sum().backward()
        results.append({k: leaves[k].grad for k in GRADIENTS})
    for name in GRADIENTS:
        assert_close(results[1][name], results[0][name], 1e-5, name)


def test_an_input_overwritten_in_place_is_autograds_error():
    t, _ = inputs((12,), 16, 24, 4, dtype=torch.float32)
    x = t["x"].detach().clone()
    y = dora_linear(**{**t, "x": x}, scaling=1.0)
    x.add_(1)
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("changed", ["norm", "gain"])
def test_a_norm_or_gain_overwritten_in_place_is_an_error_too(changed):
    t, _ = inputs((12,), 16, 24, 4, dtype=torch.float32)
    adapter = {k: t[k] for k in ("weight", "lora_A", "lora_B", "magnitude")}
    given = dict(zip(("norm", "gain"), norm_and_gain(**adapter, scaling=1.0), strict=True))
    y = dora_linear(**t, scaling=1.0, **given)
    given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_are_of_the_magnitude_that_the_forward_had():
    t, grad_y = inputs((12,), 16, 24, 4, dtype=torch.float32)
    _, expected = run(lambda **k: dora_linear(**k, scaling=1.0), t, grad_y)
    y = dora_linear(**t, scaling=1.0)
    t["magnitude"].detach().mul_(2)
    y.backward(grad_y)
    for name in GRADIENTS:
        assert torch.equal(t[name].grad, expected[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device, reentrant):
    t, grad_y = inputs((12,), 16, 24, 4, dtype=torch.float32, device=device)
    _, grads = run(lambda **k: dora_linear(**k, scaling=1.0), t, grad_y)
    order = list(t)

    def checkpointed(**k):
        def fn(*args):
            return dora_linear(**dict(zip(order, args, strict=True)), scaling=1.0)

        return checkpoint(fn, *k.values(), use_reentrant=reentrant)

    _, again = run(checkpointed, t, grad_y)
    for name in GRADIENTS:
        assert torch.equal(grads[name], again[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_picks_the_compute_dtype(device, dtype):
    t, grad_y = inputs((17,), 24, 32, 4, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=dtype):
        y = dora_linear(**t, scaling=1.0)
    assert y.dtype == dtype
    y.backward(grad_y.to(dtype))
    ref_y, ref_grads = run(lambda **k: reference.linear(**k, scaling=1.0), doubles(t), grad_y.double().cpu())
    assert_close(y, ref_y, TOLERANCE[dtype], "y")
    for name in GRADIENTS:
        assert t[name].grad.dtype == torch.float32
        assert_close(t[name].grad, ref_grads[name], 1.5 * TOLERANCE[dtype], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [(0,), (2, 0), ()])
def test_empty_batches_and_single_vectors(device, tokens):
    t, grad_y = inputs(tokens, 6, 8, 2, dtype=torch.float32, device=device)
    y, grads = run(lambda **k: dora_linear(**k, scaling=1.0), t, grad_y)
    ref_y, ref_grads = run(lambda **k: reference.linear(**k, scaling=1.0), doubles(t), grad_y.double().cpu())
    assert_close(y, ref_y, 1e-5)
    for name in GRADIENTS:
        assert_close(grads[name], ref_grads[name], 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_expanded_inputs(device):
    t, _ = inputs((1,), 6, 8, 2, dtype=torch.float32, device=device)
    wide = torch.randn(5, 16, device=device)
    ones = torch.ones(2, device=device)
    for x in (wide[:, ::2], t["x"].detach().expand(4, 3, 8), torch.randn(8, 5, device=device).T):
        t["x"] = x.requires_grad_()
        # A sum's gradient is expanded: one number with strides of zero.
        _, grads = run(lambda **k: dora_linear(**k, scaling=1.0).sum().expand(2), t, ones)
        _, ref_grads = run(
            lambda **k: reference.linear(**k, scaling=1.0).sum().expand(2), doubles(t), ones.double().cpu()
        )
        for name in GRADIENTS:
            assert_close(grads[name], ref_grads[name], 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_inference_mode_and_no_grad(device):
    t, _ = inputs((12,), 16, 24, 4, dtype=torch.float32, device=device)
    ref = reference.linear(**doubles(t), scaling=1.0)
    with torch.no_grad():
        assert_close(dora_linear(**t, scaling=1.0), ref, 1e-5)
    with torch.inference_mode():
        assert_close(dora_linear(**{**t, "x": t["x"].clone()}, scaling=1.0), ref, 1e-5)


@pytest.mark.cuda
def test_cuda_graph_replays_follow_the_weights():
    t, _ = inputs((32,), 64, 128, 8, dtype=torch.bfloat16, device="cuda")
    t = {k: v.detach() for k, v in t.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dora_linear(**t, scaling=1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = dora_linear(**t, scaling=1.0)
    t["lora_B"].mul_(3)
    graph.replay()
    assert_close(y, reference.linear(**doubles(t), scaling=1.0), TOLERANCE[torch.bfloat16])


def test_bad_arguments_are_named():
    t, _ = inputs((3,), 6, 8, 2, dtype=torch.float32)
    for change, error, message in [
        ({"x": torch.randn(3, 7)}, ValueError, "x: expected shape"),
        ({"x": torch.randn(3, 8, dtype=torch.float64)}, TypeError, "x: expected the dtype of weight"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x: expected bfloat16"),
        ({"lora_B": torch.randn(6, 3)}, ValueError, "lora_B: expected shape"),
        ({"bias": torch.randn(5)}, ValueError, "bias: expected shape"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
        ({"norm": torch.ones(6)}, ValueError, "norm and gain: expected both or neither"),
    ]:
        with pytest.raises(error, match=message):
            dora_linear(**{**t, "scaling": 1.0, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapter_that_does_nothing_changes_not_a_bit_on_the_cpu(dtype, transposed):
    t, _ = inputs((3, 7), 40, 72, 8, dtype=dtype, transposed=transposed)
    t = {name: value.detach() for name, value in t.items()}
    t["lora_B"].zero_()
    norm = torch.ones(40, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    y = dora_linear(**t, scaling=2.0, transposed=transposed, norm=norm, gain=norm)
    weight = t["weight"].T if transposed else t["weight"]
    assert torch.equal(y, torch.nn.functional.linear(t["x"], weight, t["bias"].to(dtype)))
