"""feature_gradients: what is made by output feature of E = dY^T h, against float64."""

from itertools import product

import pytest
import torch

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import DTYPES, assert_close

feature_gradients = torch.ops.dora_ext.feature_gradients
NAMES = ("grad_B", "grad_magnitude", "scaled_B")
SHAPES = [(1, 1), (5, 3), (64, 16), (33, 40), (130, 72), (9, 200)]
# Sums run in float32, and results are rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
S = 0.75


def problem(out, r, device, dtype=torch.float32, E_dtype=torch.float32, accumulate=torch.float32, spatial=0):
    """One feature of three has no norm."""

    def rand(*size, to):
        return torch.randn(*size, dtype=torch.float64).to(device, to)

    t = {
        "E": rand(out, r, to=E_dtype),
        "lora_B": rand(out, r, *([1] * spatial), to=dtype),
        "norm": rand(out, to=accumulate).abs() + 0.5,
        "gain": rand(out, to=accumulate),
        "grad_magnitude": rand(out, to=accumulate),
    }
    t["norm"][1::3] = t["gain"][1::3] = 0
    return t


def run(t, want_B=True, magnitude_dtype=torch.float32, scaled_dtype=torch.float32):
    return feature_gradients(*t.values(), S, want_B, magnitude_dtype, scaled_dtype)


def truth(t):
    E, B, n, g, dm = (None if v is None else v.double().cpu() for v in t.values())
    B = B.flatten(1)
    dm = (0 if dm is None else dm) + S * (E * B).sum(1) / n
    return S * g[:, None] * E, torch.where(n > 0, dm, 0.0), S * g[:, None] * B


def check(results, t, tolerances):
    for name, got, expected, tolerance in zip(NAMES, results, truth(t), tolerances, strict=True):
        assert_close(got, expected.view(got.shape), tolerance, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E_dtype", DTYPES, ids=str)
def test_against_float64(device, shape, dtype, E_dtype):
    accumulate = torch.float64 if torch.float64 in (dtype, E_dtype) else torch.float32
    t = problem(*shape, device, dtype, E_dtype, accumulate)
    results = run(t, magnitude_dtype=accumulate, scaled_dtype=E_dtype)
    assert [r.dtype for r in results] == [dtype, accumulate, E_dtype]
    check(results, t, [TOLERANCE[dtype], TOLERANCE[accumulate], TOLERANCE[E_dtype]])


@pytest.mark.parametrize("magnitude_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled_dtype", DTYPES, ids=str)
def test_results_in_other_dtypes_are_rounded_once(device, magnitude_dtype, scaled_dtype):
    t = problem(64, 16, device, torch.bfloat16, torch.bfloat16)
    wide, narrow = run(t), run(t, True, magnitude_dtype, scaled_dtype)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1].to(magnitude_dtype))
    assert torch.equal(narrow[2], wide[2].to(scaled_dtype))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_of_a_convolution(device, spatial):
    t = problem(33, 8, device, torch.bfloat16, spatial=spatial)
    results = run(t)
    assert results[0].shape == t["lora_B"].shape and results[2].shape == (33, 8)
    check(results, t, [TOLERANCE[torch.bfloat16], 1e-6, 1e-6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_asked_for(device, dtype):
    t = problem(40, 24, device, dtype)
    everything = run(t)
    for asked in product([True, False], [torch.float32, None], [torch.float32, None]):
        given = t if asked[0] or asked[1] else {**t, "E": None}
        for one, other, is_asked in zip(run(given, *asked), everything, asked, strict=True):
            assert torch.equal(one, other) if is_asked else one.shape == (0,)


def test_without_a_gradient_to_add_to(device):
    t = {**problem(40, 24, device), "grad_magnitude": None}
    check(run(t), t, [1e-6] * 3)


def test_features_without_a_norm_get_nothing(device):
    """Whatever there is to add to: 0 / 0 made it."""
    t = problem(12, 8, device)
    t["grad_magnitude"][1::3] = torch.nan
    grad_B, grad_magnitude, scaled_B = run(t)
    for result in (grad_B, grad_magnitude, scaled_B):
        assert result[1::3].count_nonzero() == 0 and result.isfinite().all()


def test_a_norm_that_is_not_a_number_is_not_hidden(device):
    t = problem(12, 8, device)
    t["norm"][0] = torch.nan
    assert run(t)[1].isnan().nonzero().tolist() == [[0]]


def test_norms_in_half_precision(device):
    t = problem(33, 40, device)
    t |= {name: t[name].bfloat16() for name in ("norm", "gain", "grad_magnitude")}
    check(run(t), t, [1e-6] * 3)


def test_views_that_are_not_contiguous(device):
    t = problem(33, 40, device)
    t["E"], t["lora_B"] = t["E"].t().contiguous().t(), t["lora_B"].t().contiguous().t()
    for name in ("norm", "gain", "grad_magnitude"):
        t[name] = torch.stack((t[name], t[name]), 1)[:, 0]
    results = run(t)
    assert all(r.is_contiguous() for r in results)
    check(results, t, [1e-6] * 3)


def test_no_features(device):
    assert [tuple(r.shape) for r in run(problem(0, 8, device))] == [(0, 8), (0,), (0, 8)]


def test_opcheck(device):
    for spatial in (0, 2):
        t = problem(33, 8, device, torch.bfloat16, torch.bfloat16, spatial=spatial)
        torch.library.opcheck(feature_gradients, (*t.values(), S, True, torch.bfloat16, torch.bfloat16))
    torch.library.opcheck(feature_gradients, (None, *list(t.values())[1:], S, False, None, torch.bfloat16))


def test_refuses(device):
    t = problem(16, 8, device)
    for change, kind, message in (
        ({"E": None}, ValueError, "E: expected a tensor"),
        ({"E": t["E"][:, :4]}, ValueError, "E: expected shape"),
        ({"E": t["E"].int()}, TypeError, "E: expected bfloat16"),
        ({"lora_B": t["lora_B"][0]}, ValueError, r"lora_B: expected shape \(out, r\)"),
        ({"lora_B": t["lora_B"].view(16, 4, 2)}, ValueError, r"lora_B: expected shape \(out, r\)"),
        ({"norm": t["norm"][:8]}, ValueError, "norm: expected shape"),
        ({"gain": t["gain"][:8]}, ValueError, "gain: expected shape"),
        ({"grad_magnitude": t["grad_magnitude"][:8]}, ValueError, "grad_magnitude: expected shape"),
    ):
        with pytest.raises(kind, match=message):
            run({**t, **change})
    with pytest.raises(TypeError, match="magnitude_dtype: expected bfloat16"):
        run(t, magnitude_dtype=torch.int32)
    with pytest.raises(TypeError, match="scaled_dtype: expected bfloat16"):
        run(t, scaled_dtype=torch.int32)
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        feature_gradients(*t.values(), float("nan"), True, None, None)
