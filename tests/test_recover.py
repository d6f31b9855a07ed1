"""The magnitude's gradient where the gain is so small that the output has lost u: from the products themselves."""

import pytest
import torch
from test_compose import SUM_TOLERANCE, accumulate, features, randn

from dora_ext.ops import dequantize_nf4, quantize_nf4
from dora_ext.testing import DEVICES, DTYPES, TOLERANCE, assert_close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flagged", ["some", "all", "none"])
@pytest.mark.parametrize("narrow", [False, True])
def test_magnitude_grad_recover(device, dtype, transposed, flagged, narrow):
    """narrow: dm in dtype, not in what its sums have."""
    tokens, out, inn, r = 70, 40, 2100, 5  # `in` above the kernel's piece of 2048
    grad, x, h = (randn(tokens, k, dtype=dtype, device=device) for k in (out, inn, r))
    weight = randn(out, inn, dtype=dtype, device=device, scale=inn**-0.5)
    lora_B = randn(out, r, dtype=accumulate(dtype), device=device)
    gain, _ = features(out, dtype, device, False)
    gain = {"some": gain.clone(), "all": gain * 1e-3, "none": gain.abs() + 1}[flagged]
    if flagged == "some":
        gain[1] = gain[5] = 0
        gain[6] = -0.05
    norm = gain.abs() + 0.5
    norm[5] = 0
    dm = torch.full((out,), 7.0, dtype=dtype if narrow else accumulate(dtype), device=device)
    # The gradient comes as a view that is not contiguous.
    torch.ops.dora_ext.magnitude_grad_recover_(
        dm, grad.T.contiguous().T, x, h, weight.T.contiguous() if transposed else weight, lora_B, norm, gain, 0.5,
        transposed,
    )  # fmt: skip
    u = x.double().cpu() @ weight.double().cpu().T + 0.5 * h.double().cpu() @ lora_B.double().cpu().T
    recovered = (grad.double().cpu() * u).sum(0) / norm.double().cpu()
    small = ((gain.abs() < 1 / 16) & (norm > 0)).cpu()
    assert_close(dm, torch.where(small, recovered, 7.0), (TOLERANCE if narrow else SUM_TOLERANCE)[dtype])
    assert (dm.cpu()[~small] == 7).all()


@pytest.mark.cuda
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_a_weight_packed_in_nf4(dtype, own):
    tokens, out, inn, r, device = 70, 40, 2100, 5, "cuda"
    grad, x, h = (randn(tokens, k, dtype=dtype, device=device) for k in (out, inn, r))
    lora_B = randn(out, r, dtype=accumulate(dtype), device=device)
    gain, _ = features(out, dtype, device, False)
    gain, norm = gain * 1e-3, gain.abs() + 0.5
    for double_quant in (False, True):
        q = quantize_nf4(randn(out, inn, dtype=own, device=device, scale=inn**-0.5), 64, double_quant)
        packed, dense = (torch.full((out,), 7.0, dtype=accumulate(dtype), device=device) for _ in range(2))
        torch.ops.dora_ext.magnitude_grad_recover_nf4_(packed, grad, x, h, *q.operands(), lora_B, norm, gain, 0.5)
        weight = dequantize_nf4(q).to(dtype)
        torch.ops.dora_ext.magnitude_grad_recover_(dense, grad, x, h, weight, lora_B, norm, gain, 0.5)
        assert (dense != 7).all() and torch.equal(packed, dense)


@pytest.mark.cuda
def test_opcheck():
    grad, x, h = (torch.randn(3, k, device="cuda", dtype=torch.bfloat16) for k in (4, 64, 2))
    q = quantize_nf4(torch.randn(4, 64, device="cuda"), double_quant=True)
    ones = torch.ones(4, device="cuda")
    args = (ones.clone(), grad, x, h, *q.operands(), torch.randn(4, 2, device="cuda"), ones, 1e-3 * ones, 0.5)
    torch.library.opcheck(torch.ops.dora_ext.magnitude_grad_recover_nf4_.default, args)
